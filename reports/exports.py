"""Table 2 in the formats that papers, scripts and spreadsheets take."""

import json
import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import pandas as pd

from pgt_diag import __version__
from reports.source import Run
from reports.tables import table2
from reports.text import METHOD_NAMES

LATEX_MARK = "% Table 2, made by pgt-diag"


class TableFormat(StrEnum):
    """What `pgt-diag report --format` writes beside the HTML page."""

    CSV = "csv"
    JSON = "json"
    LATEX = "latex"


_TEXTS = ("setting", "method", "variant", "note")

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def export_table2(runs: Sequence[Run], table_format: TableFormat | str) -> str:
    """Return Table 2 of these runs as text in one of the formats.

    CSV and JSON hold every column of `reports.tables.table2`; JSON has null for what is missing.
    LaTeX is a booktabs table with the paper's marks (needs the packages booktabs and xcolor).
    """
    table = table2(runs)
    match TableFormat(table_format):
        case TableFormat.CSV:
            texts = {name: table[name].map(_no_formula) for name in _TEXTS}
            return table.assign(**texts).to_csv(index=False)
        case TableFormat.JSON:
            return json.dumps(plain_records(table), indent=2, allow_nan=False) + "\n"
        case TableFormat.LATEX:
            return _latex(table)


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


def _latex(table: pd.DataFrame) -> str:
    lines = [
        f"{LATEX_MARK} {__version__}; needs the packages booktabs and xcolor",
        r"\begin{tabular}{rlrrrrr}",
        r"\toprule",
        r"Batch & Method & $\alpha$ & Train (\%) & Diff. & Test (\%) & Diff. \\",
    ]
    setting = batch = None
    for row in table[table["runs"] > 0].to_dict("records"):
        if row["setting"] != setting:
            lines += [r"\midrule", rf"\multicolumn{{7}}{{l}}{{{_escaped(row['setting'])}}} \\"]
        if (row["setting"], row["batch_size"]) != (setting, batch):
            lines.append(r"\midrule")
        setting, batch = row["setting"], row["batch_size"]
        known = {str(method): name for method, name in METHOD_NAMES.items()}
        variant = f" ({row['variant']})" if row["variant"] else ""
        cells = [
            "--" if pd.isna(batch) else str(batch),
            _escaped(known.get(str(row["method"]), row["method"]) + variant),
            "--" if pd.isna(row["alpha"]) else f"{row['alpha']:g}",
            _marked(row["train_accuracy"], row["train_spread"], row["best_train_accuracy"], "red"),
            _difference(row, "train"),
            _marked(row["test_accuracy"], row["test_spread"], row["best_test_accuracy"], "blue"),
            _difference(row, "test"),
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


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
