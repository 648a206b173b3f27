"""The paper's tables in the formats that papers, scripts and spreadsheets take."""

import json
import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import pandas as pd

from pgt_diag import __version__
from reports.layouts import LAYOUTS, Layout
from reports.source import Run
from reports.summary import Epoch
from reports.tables import fitting_layouts, paper_table
from reports.text import METHOD_NAMES

LATEX_MARKS = tuple(f"% {layout.name}, made by pgt-diag" for layout in LAYOUTS.values())


class TableFormat(StrEnum):
    """What `pgt-diag report --format` writes beside the HTML page."""

    CSV = "csv"
    JSON = "json"
    LATEX = "latex"


_TEXTS = ("setting", "model", "schedule", "method", "variant", "note")
_HEADS = {
    "batch_size": ("r", "Batch"),
    "model": ("l", "Model"),
    "schedule": ("l", "Scheduler"),
    "label_smoothing": ("r", "Label smoothing"),
    "method": ("l", "Method"),
    "alpha": ("r", r"$\alpha$"),
}
_VALUES = {
    "train_accuracy": r"Train (\%)",
    "train_difference": "Diff.",
    "test_accuracy": r"Test (\%)",
    "test_difference": "Diff.",
    "gap": r"Gap (\%)",
}

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def export_table(
    runs: Sequence[Run],
    table_format: TableFormat | str,
    number: int | None = None,
    epoch: Epoch = Epoch.BEST,
) -> str:
    """Return one of the paper's tables of these runs as text in one of the formats.

    number: the paper's, by default `default_table`. CSV and JSON hold every column of
    `reports.tables.paper_table`; JSON has null for what is missing. LaTeX is a booktabs table with
    the paper's marks (needs the packages booktabs and xcolor).
    """
    layout = LAYOUTS[number or default_table(runs)]
    table = paper_table(layout, runs, epoch)
    match TableFormat(table_format):
        case TableFormat.CSV:
            texts = {name: table[name].map(_no_formula) for name in _TEXTS if name in table}
            return table.assign(**texts).to_csv(index=False)
        case TableFormat.JSON:
            return json.dumps(plain_records(table), indent=2, allow_nan=False) + "\n"
        case TableFormat.LATEX:
            return _latex(table, layout)


def default_table(runs: Sequence[Run]) -> int:
    """Return the number of the table that is meant where none is named: 2 if any run is in it."""
    fitting = [layout.number for layout in fitting_layouts(runs)]
    return 2 if 2 in fitting else fitting[0]


def _no_formula(text: object) -> object:
    """Keep a spreadsheet from running a name that begins like a formula."""
    return f"'{text}" if isinstance(text, str) and text.startswith(tuple("=+-@\t\r")) else text


def plain_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows as JSON takes them: plain Python values, None for what is missing."""
    return [
        {str(name): _plain(value) for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def _plain(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _latex(table: pd.DataFrame, layout: Layout) -> str:
    aligned = "".join(_HEADS[name][0] for name in layout.heads) + "r" * len(layout.values)
    titles = [_HEADS[name][1] for name in layout.heads] + [_VALUES[name] for name in layout.values]
    lines = [
        f"{LATEX_MARKS[layout.number - 1]} {__version__}; needs the packages booktabs and xcolor",
        rf"\begin{{tabular}}{{{aligned}}}",
        r"\toprule",
        " & ".join(titles) + r" \\",
    ]
    setting = group = None
    for row in table[table["runs"] > 0].to_dict("records"):
        if row["setting"] != setting:
            told = _escaped(row["setting"])
            lines += [r"\midrule", rf"\multicolumn{{{len(titles)}}}{{l}}{{{told}}} \\"]
        mine = (row["setting"], *(str(row[name]) for name in layout.group))
        if mine != group:
            lines.append(r"\midrule")
        setting, group = row["setting"], mine
        cells = [_latex_head(row, name) for name in layout.heads]
        cells += [_latex_value(row, column) for column in layout.values]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_head(row: dict[Any, Any], name: str) -> str:
    value = row[name]
    if name == "method":
        known = {str(method): told for method, told in METHOD_NAMES.items()}
        variant = f" ({row['variant']})" if row["variant"] else ""
        return _escaped(known.get(str(value), str(value)) + variant)
    if pd.isna(value):
        return "--"
    if name in ("alpha", "label_smoothing"):
        return f"{value:g}"
    return _escaped(str(value).rpartition("/")[2])


def _latex_value(row: dict[Any, Any], column: str) -> str:
    if "difference" in column:
        return _difference(row, column.partition("_")[0])
    part = column.partition("_")[0]
    best = bool(row.get(f"best_{column}", False))
    return _marked(row[column], row[f"{part}_spread"], best, "red" if part == "train" else "blue")


def _marked(value: float, spread: float, best: bool, colour: str) -> str:
    if not math.isfinite(value):
        return "--"
    text = f"{value:.2f}" + ("" if not math.isfinite(spread) else rf" $\pm$ {spread:.2f}")
    return rf"\textcolor{{{colour}}}{{\textbf{{{text}}}}}" if best else text


def _difference(row: dict[Any, Any], part: str) -> str:
    value, interval = row[f"{part}_difference"], row[f"{part}_interval"]
    if pd.isna(value):
        return "--"
    text = f"${value:+.2f}$"
    if not pd.isna(interval):
        text += rf" $\pm$ {interval:.2f}"
    return rf"\colorbox{{yellow}}{{{text}}}" if row[f"best_{part}_difference"] else text


def _escaped(text: object) -> str:
    return "".join(_LATEX_SPECIAL.get(sign, sign) for sign in str(text))
