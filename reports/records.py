"""What the template prints of tables and runs: deaths, Table 2, commands, configurations."""

import math
import shlex
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import pandas as pd

from pgt_diag.filters import death_window
from pgt_diag.text import printable
from reports.sections import Islands
from reports.source import Run
from reports.summary import RunSummary
from reports.tables import MARKED, table2
from reports.text import METHOD_NAMES, number, plural, share

MAX_DEATHS = 20_000
"""Most rows of the table of deaths; the page stays under a megabyte and a half for them."""


def deaths(summaries: Sequence[RunSummary], islands: Islands) -> dict[str, object]:
    """Return the table of all deaths of all runs, in order of iteration."""
    columns = ["run", "layer", "index", "filter", "iteration", "revival", "lasted", "cause"]
    rows: list[list[Any]] = []
    for summary in summaries:
        end = summary.run.iteration_count
        rows += [
            [
                summary.label,
                printable(death.layer),
                death.layer_index,
                death.filter,
                death.iteration,
                death.revival,
                (end if death.revival is None else death.revival) - death.iteration,
                death.cause,
            ]
            for death in summary.death_list
        ]
    total = len(rows)
    rows = sorted(rows, key=itemgetter(columns.index("iteration")))[:MAX_DEATHS]
    if rows:
        islands["deaths-data"] = {"columns": columns, "rows": rows}
    windows = {death_window(summary.run.iteration_count) for summary in summaries} or {10}
    return {
        "columns": columns,
        "sorted": columns.index("iteration"),
        "rows": rows,
        "total": total,
        "cut": total > len(rows),
        "window": " or ".join(plural(window, "iteration") for window in sorted(windows)),
    }


def table_2(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Return Table 2 as groups of formatted rows."""
    table = table2(runs)
    groups: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        setting = "" if row["runs"] == 0 else str(row["setting"])
        key = (setting, str(row["batch_size"]))
        if not groups or groups[-1]["key"] != key:
            title = setting
            if row["runs"] == 0 and (not groups or groups[-1]["setting_kind"] != "paper"):
                title = "in the paper only"
            kind = "paper" if row["runs"] == 0 else "ours"
            groups.append({"key": key, "setting": title, "setting_kind": kind, "rows": []})
        groups[-1]["rows"].append(_table2_row(row))
    return groups


def _table2_row(row: dict[Any, Any]) -> dict[str, object]:
    known = {str(method): name for method, name in METHOD_NAMES.items()}
    missing = row["runs"] == 0
    alpha = row["paper_alpha"] if missing else row["alpha"]
    formatted: dict[str, object] = {
        "missing": missing,
        "batch": "–" if pd.isna(row["batch_size"]) else int(row["batch_size"]),
        "method": known.get(str(row["method"]), str(row["method"])),
        "alpha": "–" if pd.isna(alpha) else f"{alpha:g}",
        "runs": row["runs"],
        "note": "; ".join(filter(None, (row["variant"], row["note"]))),
        "dead": "–" if missing else number(row["dead"], 0 if row["runs"] == 1 else 1),
    }
    for column in MARKED:
        part = column.split("_")[0]
        if not missing:
            wide = f"{part}_spread" if "accuracy" in column else f"{part}_interval"
            formatted[part if "accuracy" in column else column] = _cell(row, column, row[wide])
    formatted["paper"] = [
        _cell(row, f"paper_{part}_{what}", math.nan, digits=3 if part == "test" else 2)
        for part in ("train", "test")
        for what in ("accuracy", "difference")
    ]
    return formatted


def _cell(row: dict[Any, Any], column: str, spread: float, digits: int = 2) -> dict[str, object]:
    difference = "difference" in column
    return {
        "value": number(row[column], digits, sign=difference),
        "spread": "" if pd.isna(spread) else number(spread),
        "best": row[f"best_{column}"],
        "part": "" if difference else ("train" if "train" in column else "test"),
    }


def run_cards(summaries: Sequence[RunSummary]) -> list[dict[str, object]]:
    """Return each run's status, command and measured overhead."""
    return [
        {
            "label": summary.label,
            "status": printable(summary.run.status),
            "facts": "; ".join(_run_facts(summary)),
            "command": printable(shlex.join(map(str, summary.run.info.get("command") or [])), 2000),
        }
        for summary in summaries
    ]


def _run_facts(summary: RunSummary) -> list[str]:
    info = summary.run.info
    facts = [
        f"folder {printable(summary.run.name)}",
        plural(summary.run.iteration_count, "iteration"),
        f"norms stored every {info.get('record_every') or 1} iterations"
        if (info.get("record_every") or 1) > 1
        else "norms stored at every iteration",
    ]
    if resumed := info.get("resumed_from"):
        times = plural(len(resumed), "time")
        facts.append(f"resumed {times}, last at iteration {printable(resumed[-1])}")
    if replaced := info.get("bad_images"):
        facts.append(
            f"{plural(len(replaced), 'unreadable image')} replaced by another of its class"
        )
    overhead = info.get("overhead")
    if isinstance(overhead, dict) and overhead.get("training_seconds"):
        spent, all_of = float(overhead["recorder_seconds"]), float(overhead["training_seconds"])
        facts.append(
            f"recording took {number(spent, 1)} s of {number(all_of, 1)} s ({share(spent, all_of)})"
        )
    metrics = summary.run.metrics
    if "images_per_second" in metrics and metrics["images_per_second"].notna().any():
        facts.append(f"{number(float(metrics['images_per_second'].median()), 0)} images/s")
    return facts


def config_tables(summaries: Sequence[RunSummary]) -> list[dict[str, object]]:
    """Return what differs between the configurations, then all of it, then the environments."""
    labels = [summary.label for summary in summaries]
    configs = [
        _flat(summary.run.config.to_mapping() if summary.run.config else {})
        for summary in summaries
    ]
    environments = [
        _flat(
            {key: summary.run.info.get(key) for key in ("created", "ended", "model", "data")}
            | {"environment": summary.run.info.get("environment")}
        )
        for summary in summaries
    ]
    everything = _rows(configs)
    differing = [row for row in everything if len(set(row[1])) > 1]
    tables = [("What differs between the configurations", differing, False)] if differing else []
    tables += [
        ("Whole configuration", everything, True),
        ("Environment and data", _rows(environments), True),
    ]
    return [
        {"title": title, "rows": rows, "fold": fold, "columns": labels}
        for title, rows, fold in tables
        if rows
    ]


def _rows(each: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    keys = dict.fromkeys(key for values in each for key in values)
    return [(key, [values.get(key, "–") for values in each]) for key in keys]


def _flat(values: object, prefix: str = "") -> dict[str, str]:
    """Return nested values as 'outer.inner' → printable text."""
    if not isinstance(values, dict):
        return {prefix or "value": "–" if values is None else printable(values, 300)}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{printable(key)}" if prefix else printable(key))
    return flat
