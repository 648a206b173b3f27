"""`pgt-diag show`: the verdict and the tables of runs, in the terminal."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from reports.summary import RunSummary
    from reports.verdict import Verdict

EPILOG = """\b
Examples:
  pgt-diag show runs/pgt                    what died, when, and where
  pgt-diag show runs                        every run in a folder, compared
  pgt-diag show runs/pgt --json | jq '.runs[0].dead'

With --json: one object with schema_version, runs (label, path, status, iterations, filters, dead,
unknown, silent_from_start, died_later, deaths, revivals, died, first_death, accuracies, layers, …),
verdict (sentences, comparisons, claims, warnings), table1, table2 and table3; what is missing is
null.
"""

_JUDGEMENTS = {"agrees": "green", "contradicts": "red"}


def show(
    runs: list[Path] = typer.Argument(help="Run directories, or folders of them."),
    last: bool = typer.Option(
        False,
        "--last-epoch",
        help="Accuracies of the last epoch, not of the best on test images.",
    ),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object instead."),
) -> None:
    """Print the verdict, the deaths of every layer and the paper's tables that the runs fill."""
    # Late, so that a mistyped option is answered before pandas is loaded.
    from commands import terminal
    from pgt_diag.run import load_run
    from reports.digest import digest
    from reports.records import paper_tables
    from reports.summary import Epoch, summarise
    from reports.verdict import verdict

    epoch = Epoch.LAST if last else Epoch.BEST
    loaded = [load_run(path) for path in terminal.find_all(runs)]
    if json_output:
        terminal.write_out(json.dumps(digest(loaded, epoch), indent=2, allow_nan=False) + "\n")
        return
    screen = terminal.console()
    _print_verdict(screen, verdict(loaded, epoch))
    for summary in summarise(loaded):
        _print_layers(screen, summary)
    for each in paper_tables(loaded, epoch):
        _print_table(screen, each)


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
        made.add_row(*_layer_cells(row), style="" if row["dead"] or row["unknown"] else "dim")
    screen.print()
    screen.print(made)


def _layer_cells(row: dict[Any, Any]) -> list[str]:
    from commands.terminal import safe
    from reports.text import dead_share

    return [
        str(row["index"]),
        safe(row["layer"]),
        f"{row['filters']:,}",
        f"{row['dead']:,}" + (f", {row['unknown']:,} unknown" if row["unknown"] else ""),
        dead_share(row["dead"], row["unknown"], row["filters"]),
        f"{row['silent_from_start']:,}",
        f"{row['revivals']:,}",
        "–" if row["first_death"] is None else f"{row['first_death']:,}",
    ]


def _print_table(screen: "Console", shown: dict[str, Any]) -> None:
    from commands.terminal import safe, table

    made = table(screen, f"{shown['name']}: {shown['title']}")
    for head in shown["heads"]:
        made.add_column(head["name"], justify="right" if head["numeric"] else "left")
    # Of the paper's, those of test images: a terminal is narrow.
    first = shown["paper_values"].index("test %")
    papers = [f"paper: {shown['paper_values'][first]}", *shown["paper_values"][first + 1 :]]
    for name in ("runs", *shown["values"], "dead", *papers):
        made.add_column(name.replace("difference", "diff."), justify="right")
    made.add_column("note")
    settings: dict[str, str] = {}
    letter = ""
    for group in shown["groups"]:
        if not group["rows"][0]["missing"]:
            letter = settings.setdefault(group["told"], f"({len(settings) + 1})")
        rows = [row for row in group["rows"] if not row["missing"]]
        for place, row in enumerate(rows):
            note = " ".join(filter(None, (letter, row["note"])))
            made.add_row(
                *_table_cells(row, first), safe(note, 160), end_section=place == len(rows) - 1
            )
    screen.print()
    screen.print(made)
    for setting, letter in settings.items():
        screen.print(f"{letter} {safe(setting, 300)}", soft_wrap=not screen.is_terminal)
    screen.print(
        f"{shown['note']} ★ best accuracy, ▲ largest gain, where that is more than chance; "
        "differences are to the baseline of the same setting, data, batch size and seed, ± half "
        "their 95 % interval.",
        style="dim" if screen.is_terminal else "",
        soft_wrap=not screen.is_terminal,
    )


def _table_cells(row: dict[str, Any], first_of_paper: int) -> list[str]:
    from commands.terminal import safe

    marks = {"train": ("★", "red"), "test": ("★", "blue"), "": ("▲", "yellow")}
    cells = [*(safe(head) for head in row["heads"]), str(row["runs"])]
    cells += [_marked(cell, *marks.get(cell["part"], ("", ""))) for cell in row["cells"]]
    papers = row["paper"][first_of_paper:]
    return [*cells, str(row["dead"]), *(_marked(cell, "★", "") for cell in papers)]


def _marked(cell: dict[str, Any], mark: str, colour: str) -> str:
    text = str(cell["value"]) + (f" ± {cell['spread']}" if cell["spread"] else "")
    if not cell["best"]:
        return text
    return f"[{colour} bold]{mark} {text}[/]" if colour else f"{mark} {text}"
