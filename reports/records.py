"""What the template prints of tables and runs: deaths, accuracies, commands, configurations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from operator import itemgetter
from typing import Any

import pandas as pd

from pgt_diag.filters import MIN_DEATH_WINDOW, DeathCounts
from pgt_diag.text import printable, quoted
from reports.layouts import Layout
from reports.sections import Islands
from reports.source import Run
from reports.summary import Epoch, RunSummary
from reports.tables import fitting_layouts, paper_table
from reports.text import METHOD_NAMES, death_counts, number, plural, share

MAX_SINGLE_COUNTS = 4
"""Runs up to which the deaths of each are counted in a sentence of its own."""

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
    windows = {summary.window for summary in summaries} or {MIN_DEATH_WINDOW}
    return {
        "columns": columns,
        "sorted": columns.index("iteration"),
        "rows": rows,
        "total": total,
        "cut": total > len(rows),
        "counts": _death_counts(summaries),
        "none": _none(summaries),
        "window": " or ".join(plural(window, "iteration") for window in sorted(windows)),
    }


def _none(summaries: Sequence[RunSummary]) -> str:
    """Say that no death is known."""
    if undecided := sum(len(each.undecided) for each in summaries):
        return f"No death is known; of {plural(undecided, 'filter')} nobody can tell."
    return "No filter died in these runs."


def _death_counts(summaries: Sequence[RunSummary]) -> list[str]:
    """Say of each run, or of many runs together, how deaths, revivals and the dead add up."""
    if len(summaries) <= MAX_SINGLE_COUNTS:
        return [
            f"{each.label}: {death_counts(each.counts)}."
            for each in summaries
            if each.counts.deaths
        ]
    each_run = [astuple(summary.counts) for summary in summaries]
    return [f"{death_counts(DeathCounts(*map(sum, zip(*each_run, strict=True))))}."]


EPOCH_NOTES = {
    Epoch.BEST: "Best epoch by test accuracy, as the authors report",
    Epoch.LAST: "Last epoch",
}

_HEADS = {
    "batch_size": "batch",
    "model": "network",
    "schedule": "schedule",
    "label_smoothing": "smoothing",
    "method": "method",
    "alpha": "α",
}
_NUMERIC_HEADS = ("batch_size", "label_smoothing", "alpha")


def paper_tables(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> list[dict[str, Any]]:
    """Return those of the paper's tables that these runs fill, as groups of formatted rows."""
    return [_paper_table(layout, runs, epoch) for layout in fitting_layouts(runs)]


def _paper_table(layout: Layout, runs: Sequence[Run], epoch: Epoch) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    for row in paper_table(layout, runs, epoch).to_dict("records"):
        missing = row["runs"] == 0
        key = (str(row["setting"]), *(str(row[name]) for name in layout.group))
        if not groups or groups[-1]["key"] != key:
            before = groups[-1]["told"] if groups else None
            told = "in the paper only" if missing else str(row["setting"])
            # Where settings come first, each is told once, above all that was trained in it.
            title = "" if told == before and (missing or layout.by_setting) else told
            groups.append({"key": key, "setting": title, "told": told, "rows": []})
        groups[-1]["rows"].append(_table_row(row, layout))
    return {
        "anchor": layout.anchor,
        "name": layout.name,
        "title": layout.title,
        "note": " ".join(filter(None, (f"{EPOCH_NOTES[epoch]}.", layout.note))),
        "heads": [
            {"name": _HEADS[name], "numeric": name in _NUMERIC_HEADS} for name in layout.heads
        ],
        "values": [_value_name(name) for name in layout.values],
        "paper_values": [_value_name(name) for name in layout.paper_values],
        "groups": groups,
    }


def _value_name(column: str) -> str:
    part, _, what = column.partition("_")
    return {"accuracy": f"{part} %", "difference": "difference", "": part}[what]


def _table_row(row: dict[Any, Any], layout: Layout) -> dict[str, Any]:
    missing = row["runs"] == 0
    shown = row | {"alpha": row["paper_alpha"]} if missing else row
    cells = [
        _cell(row, column, row[_wide(column)]) for column in ("" if missing else layout.values)
    ]
    return {
        "missing": missing,
        "heads": [_head(name, shown[name]) for name in layout.heads],
        "runs": row["runs"],
        "note": "; ".join(filter(None, (row["variant"], row["note"]))),
        "cells": cells,
        "dead": "–" if missing else _dead(row),
        "paper": [
            _cell(row, f"paper_{column}", math.nan, digits=2 if "train" in column else 3)
            for column in layout.paper_values
        ],
    }


def _dead(row: dict[Any, Any]) -> str:
    digits = 0 if row["runs"] == 1 else 1
    unknown = f", {number(row['unknown'], digits)} unknown" if row["unknown"] else ""
    return number(row["dead"], digits) + unknown


def _head(name: str, value: Any) -> str:
    if name == "method":
        known = {str(method): told for method, told in METHOD_NAMES.items()}
        return known.get(str(value), str(value))
    if pd.isna(value) or (name == "label_smoothing" and not value):
        return "–"
    if name == "model":
        return printable(value).rpartition("/")[2]
    if name == "batch_size":
        return str(int(value))
    return str(value) if name == "schedule" else f"{value:g}"


def _wide(column: str) -> str:
    part, _, what = column.partition("_")
    return f"{part}_interval" if what == "difference" else f"{part}_spread"


def _cell(row: dict[Any, Any], column: str, spread: float, digits: int = 2) -> dict[str, object]:
    """Return a value as it is printed; part is what colour marks its best, '' for a difference."""
    kind = next(name for name in ("difference", "gap", "train", "test") if name in column)
    return {
        "value": number(row[column], digits, sign=kind == "difference"),
        "spread": "" if pd.isna(spread) else number(spread),
        "best": bool(row.get(f"best_{column}", False)),
        "part": "" if kind == "difference" else kind,
    }


def run_cards(summaries: Sequence[RunSummary]) -> list[dict[str, object]]:
    """Return each run's status, command and measured overhead."""
    return [
        {
            "label": summary.label,
            "status": printable(summary.run.status),
            "facts": "; ".join(_run_facts(summary)),
            "command": printable(quoted(summary.run.info.get("command") or []), 2000),
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
        where = ""
        if _environment(info).get("device", "cpu") != "cpu":
            # Kernels are only started there: what they take of the GPU no clock on the CPU sees.
            where = " of the CPU's, without the GPU's, which pgt-diag bench measures"
        facts.append(
            f"recording took {number(spent, 1)} s of {number(all_of, 1)} s "
            f"({share(spent, all_of)}){where}"
        )
    metrics = summary.run.metrics
    if "images_per_second" in metrics and metrics["images_per_second"].notna().any():
        facts.append(f"{number(float(metrics['images_per_second'].median()), 0)} images/s")
    return facts


def _environment(info: Mapping[str, Any]) -> Mapping[str, Any]:
    found = info.get("environment")
    return found if isinstance(found, dict) else {}


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
