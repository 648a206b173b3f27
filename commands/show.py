"""`pgt-diag show`: the verdict and the tables of runs, in the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from reports.source import Run
    from reports.summary import RunSummary
    from reports.verdict import Verdict

EPILOG = """\b
Examples:
  pgt-diag show runs/pgt                    what died, when, and where
  pgt-diag show runs                        every run in a folder, compared
  pgt-diag show runs/pgt --json | jq '.runs[0].dead'

With --json: one object with schema_version, runs (label, path, status, iterations, filters, dead,
silent_from_start, died_later, revived, first_death, accuracies, layers, …), verdict (sentences,
comparisons, claims, warnings) and table2; what is missing is null.
"""

_JUDGEMENTS = {"agrees": "green", "contradicts": "red"}


def show(
    runs: list[Path] = typer.Argument(help="Run directories, or folders of them."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object instead."),
) -> None:
    """Print the verdict, the deaths of every layer and Table 2."""
    # Late, so that a mistyped option is answered before pandas is loaded.
    from commands import terminal
    from pgt_diag.run import load_run
    from reports.digest import digest
    from reports.summary import summarise
    from reports.verdict import verdict

    loaded = [load_run(path) for path in terminal.find_all(runs)]
    if json_output:
        terminal.write_out(json.dumps(digest(loaded), indent=2, allow_nan=False) + "\n")
        return
    screen = terminal.console()
    _print_verdict(screen, verdict(loaded))
    for summary in summarise(loaded):
        _print_layers(screen, summary)
    _print_table2(screen, loaded)


def _print_verdict(screen: "Console", judged: "Verdict") -> None:
    """Print warnings, comparisons, sentences and claims, one to a line."""
    from commands.terminal import safe

    lines = [f"[bold yellow]Careful:[/] {safe(each, 2000)}" for each in judged.warnings]
    lines += [safe(each, 2000) for each in judged.comparisons]
    lines += [f"[bold]{safe(each.label)}:[/] {safe(each.text, 2000)}" for each in judged.sentences]
    for claim in judged.claims:
        colour = _JUDGEMENTS.get(claim.judgement, "yellow")
        lines.append(
            f"The paper: {safe(claim.statement, 200)}: [{colour}]{claim.judgement}[/] "
            f"({safe(claim.evidence, 1000)})"
        )
    for line in lines:
        # Folded where somebody reads; whole lines for what reads lines.
        screen.print(line, soft_wrap=not screen.is_terminal)


def _print_layers(screen: "Console", summary: "RunSummary") -> None:
    from commands.terminal import safe, table

    made = table(screen, f"Deaths by layer: {safe(summary.label)}")
    made.add_column("#", justify="right")
    made.add_column("layer")
    for name in ("filters", "dead", "share", "from the first batch", "revivals", "first death"):
        made.add_column(name, justify="right")
    rows = summary.by_layer.reset_index().astype(object)
    for row in rows.where(rows.notna(), None).to_dict("records"):
        made.add_row(*_layer_cells(row), style="" if row["dead"] else "dim")
    screen.print()
    screen.print(made)


def _layer_cells(row: dict[Any, Any]) -> list[str]:
    from commands.terminal import safe
    from reports.text import share

    return [
        str(row["index"]),
        safe(row["layer"]),
        f"{row['filters']:,}",
        f"{row['dead']:,}",
        share(row["dead"], row["filters"]) if row["dead"] else "0",
        f"{row['silent_from_start']:,}",
        f"{row['revivals']:,}",
        "–" if row["first_death"] is None else f"{row['first_death']:,}",
    ]


def _print_table2(screen: "Console", runs: "Sequence[Run]") -> None:
    from commands.terminal import safe, table
    from reports.records import table_2

    made = table(screen, "Table 2: accuracy by batch size and method, beside the paper's")
    names = "batch", "method", "α", "runs", "train %", "diff.", "test %", "diff.", "dead"
    for name in (*names, "paper: test %", "diff."):
        made.add_column(name, justify="left" if name == "method" else "right")
    made.add_column("note")
    for group in table_2(runs):
        rows: list[Any] = [row for row in group["rows"] if not row["missing"]]  # type: ignore[attr-defined]
        for place, row in enumerate(rows):
            last = place == len(rows) - 1
            note = "; ".join(filter(None, (str(group["setting"]), row["note"])))
            made.add_row(*_table2_cells(row), safe(note, 160), end_section=last)
    screen.print()
    screen.print(made)
    screen.print(
        "★ best accuracy, ▲ largest gain; differences are to the baseline of the same setting, "
        "batch size and seed, ± half their 95 % interval.",
        style="dim" if screen.is_terminal else "",
        soft_wrap=not screen.is_terminal,
    )


def _table2_cells(row: dict[str, Any]) -> list[str]:
    from commands.terminal import safe

    paper = row["paper"]
    cells = [str(row["batch"]), safe(row["method"]), safe(row["alpha"]), str(row["runs"])]
    cells += [
        _marked(row["train"], "★", "red"),
        _marked(row["train_difference"], "▲", "yellow"),
        _marked(row["test"], "★", "blue"),
        _marked(row["test_difference"], "▲", "yellow"),
    ]
    return [*cells, str(row["dead"]), *(_marked(cell, "★", "") for cell in paper[2:])]


def _marked(cell: dict[str, Any], mark: str, colour: str) -> str:
    text = str(cell["value"]) + (f" ± {cell['spread']}" if cell["spread"] else "")
    if not cell["best"]:
        return text
    return f"[{colour} bold]{mark} {text}[/]" if colour else f"{mark} {text}"
