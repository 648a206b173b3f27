"""`pgt-diag show`: the verdict and the tables of runs, in the terminal."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from commands.columns import Column
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
    from pgt_diag.run import find_runs, load_run
    from reports.digest import digest
    from reports.records import paper_tables
    from reports.summary import Epoch, summarise
    from reports.verdict import verdict

    epoch = Epoch.LAST if last else Epoch.BEST
    loaded = [load_run(path) for path in find_runs(runs)]
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
        _print_lines(screen, line)


def _print_layers(screen: "Console", summary: "RunSummary") -> None:
    from commands.columns import Column, fitting_table
    from commands.terminal import safe, shortened
    from reports.text import dead_share

    by_layer = summary.by_layer.reset_index().astype(object)
    rows = by_layer.where(by_layer.notna(), None).to_dict("records")
    made, left_out = fitting_table(
        screen,
        f"Deaths by layer: {safe(summary.label)}",
        [
            Column("#", [str(row["index"]) for row in rows]),
            Column("layer", [shortened(row["layer"]) for row in rows], right=False),
            Column("filters", [f"{row['filters']:,}" for row in rows], rank=1),
            Column("dead", [_dead(row) for row in rows]),
            Column(
                "share",
                [dead_share(row["dead"], row["unknown"], row["filters"]) for row in rows],
                rank=3,
            ),
            Column(
                "from the first batch", [f"{row['silent_from_start']:,}" for row in rows], rank=5
            ),
            Column("revivals", [f"{row['revivals']:,}" for row in rows], rank=4),
            Column(
                "first death",
                ["–" if row["first_death"] is None else f"{row['first_death']:,}" for row in rows],
                rank=2,
            ),
        ],
        styles=["" if row["dead"] or row["unknown"] else "dim" for row in rows],
    )
    screen.print()
    screen.print(made)
    _say_left_out(screen, left_out)


def _dead(row: dict[Any, Any]) -> str:
    return f"{row['dead']:,}" + (f", {row['unknown']:,} unknown" if row["unknown"] else "")


def _say_left_out(screen: "Console", names: list[str]) -> None:
    if names:
        _print_lines(
            screen, f"[dim]Left out for want of room: {', '.join(dict.fromkeys(names))}[/]"
        )


def _print_lines(screen: "Console", line: str) -> None:
    """Print markup: folded between words where somebody reads, whole for what reads lines."""
    from rich.text import Text

    from commands.terminal import between_words

    text = Text.from_markup(line)
    if screen.is_terminal:
        # Of the same length, so that what is bold stays so.
        text.plain = between_words(text.plain, screen.width)
    screen.print(text, soft_wrap=True)


def _print_table(screen: "Console", shown: dict[str, Any]) -> None:
    from commands.columns import fitting_table

    # Of the paper's values, those of test images: a terminal is narrow.
    first = shown["paper_values"].index("test %")
    rows, notes, ends = [], [], []
    settings: dict[str, str] = {}
    letter = ""
    for group in shown["groups"]:
        if not group["rows"][0]["missing"]:
            letter = settings.setdefault(group["told"], f"({len(settings) + 1})")
        ours = [row for row in group["rows"] if not row["missing"]]
        rows += ours
        notes += [" ".join(filter(None, (letter, row["note"]))) for row in ours]
        ends.append(len(rows) - 1)
    columns = _table_columns(shown, rows, notes, first)
    title = f"{shown['name']}: {shown['title']}"
    made, left_out = fitting_table(screen, title, columns, ends=ends)
    screen.print()
    screen.print(made)
    _say_left_out(screen, left_out)
    _print_settings(screen, shown["note"], settings)


def _print_settings(screen: "Console", note: str, settings: dict[str, str]) -> None:
    from commands.terminal import safe

    for setting, letter in settings.items():
        _print_lines(screen, f"{letter} {safe(setting, 300)}")
    legend = (
        f"{safe(note, 2000)} ★ best accuracy, ▲ largest gain, where that is more than chance; "
        "differences are to the baseline of the same setting, data, batch size and seed, ± half "
        "their 95 % interval."
    )
    _print_lines(screen, f"[dim]{legend}[/]" if screen.is_terminal else legend)


def _table_columns(
    shown: dict[str, Any], rows: list[dict[str, Any]], notes: list[str], first_of_paper: int
) -> "list[Column]":
    """Return a paper's table as columns: what leaves first is the paper's own, then training's."""
    from commands.columns import Column
    from commands.terminal import safe

    marks = {"train": ("★", "red"), "test": ("★", "blue"), "": ("▲", "yellow")}
    made = [
        Column(head["name"], [safe(row["heads"][place]) for row in rows], right=head["numeric"])
        for place, head in enumerate(shown["heads"])
    ]
    made.append(Column("runs", [str(row["runs"]) for row in rows], rank=3))
    of_test = shown["values"].index("test %")
    for place, name in enumerate(shown["values"]):
        cells = [
            _marked(cell, *marks.get(cell["part"], ("", "")))
            for cell in (row["cells"][place] for row in rows)
        ]
        rank = _rank(name) if place >= of_test else 4 + place
        made.append(Column(name.replace("difference", "diff."), cells, rank=rank))
    made.append(Column("dead", [str(row["dead"]) for row in rows], rank=2))
    for place, name in enumerate(shown["paper_values"]):
        if place >= first_of_paper:
            cells = [_marked(row["paper"][place], "★", "") for row in rows]
            told = f"paper: {name}" if place == first_of_paper else name
            rank = 6 + place - first_of_paper
            made.append(Column(told.replace("difference", "diff."), cells, rank=rank))
    made.append(Column("note", [safe(note, 160) for note in notes], right=False, folds=True))
    return made


def _rank(value: str) -> int:
    """Return when one of a table's values of test images leaves; the accuracy never does."""
    return {"test %": 0, "difference": 1}.get(value, 4)


def _marked(cell: dict[str, Any], mark: str, colour: str) -> str:
    text = str(cell["value"]) + (f" ± {cell['spread']}" if cell["spread"] else "")
    if not cell["best"]:
        return text
    return f"[{colour} bold]{mark} {text}[/]" if colour else f"{mark} {text}"
