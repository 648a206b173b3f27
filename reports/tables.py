"""The paper's Tables 1, 2 and 3, filled from runs, as DataFrames."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pgt_diag.config import Method, RunConfig
from pgt_diag.paper import TABLE_3_MODEL
from reports.layouts import LAYOUTS, SETTING_KEYS, Layout, is_batch_normalised, method_place
from reports.source import Run
from reports.summary import Epoch, RunSummary, summarise
from reports.text import join

PAPER_TABLE_2 = LAYOUTS[2].paper
"""Table 2 of the paper: non-BN ResNet-18 on ImageNet-1K, accuracies in percent."""

RECIPE_KEYS = (
    "lr", "weight_decay", "momentum", "nesterov", "decay_biases", "schedule", "step_epochs",
    "warmup_epochs", "warmup_lr", "warmup_prefix", "cooldown_epochs", "min_lr", "lr_update",
    "label_smoothing",
)  # fmt: skip
"""What a pair should share as well; where it cannot, the difference is not the method's alone."""

METHOD_KEYS = ("clip_norm", "agc_clip_factor", "agc_eps", "agc_classifier")
"""A method's own options: with RECIPE_KEYS, what tells repetitions of a cell from variants."""

MARKED = ("train_accuracy", "test_accuracy", "train_difference", "test_difference")
"""The columns whose best value is marked, as in the paper."""

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (then nearly normal).
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval95(values: Iterable[float]) -> float:
    """Return the half-width of the 95 % interval of a mean (Student's t); NaN for fewer than 2."""
    sample = np.asarray([value for value in values if math.isfinite(value)])
    if len(sample) < 2:
        return math.nan
    quantile = _T95[len(sample) - 2] if len(sample) - 2 < len(_T95) else 1.96
    return float(quantile * sample.std(ddof=1) / math.sqrt(len(sample)))


def runs_table(summaries: Sequence[RunSummary]) -> pd.DataFrame:
    """Return one row per run: setting, batch size, seed, method, alpha, status, accuracies, dead.

    Accuracies are those of the epoch that the summaries are made for. A run without a configuration
    has its label as method and no batch size.
    """
    rows = []
    for summary in summaries:
        run, accuracy = summary.run, summary.accuracy
        config = run.config
        rows.append(
            {
                "label": summary.label,
                "status": run.status,
                "setting": _setting(run, SETTING_KEYS),
                "batch_size": config.batch_size if config else None,
                "seed": config.seed if config else None,
                "method": str(config.method) if config else summary.label,
                "alpha": config.alpha if config and config.method.uses_pgt else math.nan,
                "model": config.model if config else None,
                "schedule": str(config.schedule) if config else None,
                "label_smoothing": config.label_smoothing if config else math.nan,
                "recipe": _values(run, RECIPE_KEYS),
                "options": _values(run, METHOD_KEYS),
                "train_accuracy": accuracy.train if accuracy else math.nan,
                "test_accuracy": accuracy.test if accuracy else math.nan,
                "gap": accuracy.train - accuracy.test if accuracy else math.nan,
                "dead": summary.dead,
                "filters": summary.filters,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"batch_size": "Int64", "seed": "Int64"}) if rows else table


def _values(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    if run.config is None:
        return ()
    # What two runs were trained with, whichever rule made it.
    values = {"lr": run.config.peak_lr}
    return tuple(str(values.get(key, getattr(run.config, key))) for key in keys)


def paired_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each run, its difference to the baseline of the same setting, batch and seed.

    table: as `runs_table` makes it, finished runs only. Of several such baselines those with the
    run's own recipe (learning rate and so on) are meant; without one, all if they share a recipe,
    and none otherwise. Columns train_difference, test_difference and dead_difference, NaN for
    baselines and where no baseline matches, and confounded: names of RECIPE_KEYS that differ.
    """
    key = ["setting", "batch_size", "seed"]
    names = {"train_accuracy": "train", "test_accuracy": "test", "dead": "dead"}
    columns = [f"{name}_difference" for name in names.values()]
    differences = pd.DataFrame(math.nan, index=table.index, columns=columns)
    confounded: dict[object, tuple[str, ...]] = {}
    baselines = dict(list(table[table["method"] == "baseline"].groupby(key)))
    for row, run in table[table["method"] != "baseline"].iterrows():
        found = baselines.get(tuple(run[key]))
        if found is None:
            continue
        same = found[found["recipe"] == run["recipe"]]
        if same.empty and found["recipe"].nunique() > 1:
            continue
        chosen = found if same.empty else same
        for value, name in names.items():
            differences.loc[row, f"{name}_difference"] = run[value] - chosen[value].mean()
        pairs = zip(RECIPE_KEYS, run["recipe"], chosen["recipe"].iloc[0], strict=True)
        confounded[row] = tuple(
            name.replace("_", " ") for name, mine, theirs in pairs if mine != theirs
        )
    differences["confounded"] = [confounded.get(row, ()) for row in table.index]
    return differences


def paper_table(layout: Layout, runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> pd.DataFrame:
    """Return one of the paper's tables of these runs, the paper's values beside them.

    One row per setting, the layout's keys (in the paper's order) and `variant` (the learning rate
    and so on, where runs of a cell differ in more than the seed). Means and spreads (standard
    deviation) over the finished runs of their accuracies at `epoch`; differences are means over
    pairs with the baseline of the same setting, batch size and seed, with the half-width of their
    95 % interval; see `paired_differences`. `note` says what was left out or differs besides the
    method. Rows with `runs` 0 are cells of the paper that these runs do not have. `best_*` marks
    the best of each setting and group.
    """
    summaries = [each for each in summarise(runs, epoch) if _belongs(layout, each.run, runs)]
    table = runs_table(summaries)
    ours: list[dict[str, object]] = []
    if summaries:
        usable = table[table["status"] == "finished"]
        table = table.join(paired_differences(usable))
        table["setting"] = [_setting(each.run, layout.setting) for each in summaries]
        table = _with_lr_rule(table, summaries)
        ours = [_cell(key, group) for key, group in _cells(table, layout)]
    have = {_known(row, layout.match) for row in ours}
    missing: list[dict[str, object]] = [
        {key: row[key] for key in layout.match}
        | {"runs": 0, "note": "not run", "setting": "", "variant": ""}
        for row in layout.paper.to_dict("records")
        if _known(row, layout.match) not in have
    ]
    result = pd.DataFrame(ours + missing, columns=["setting", *layout.keys, *_COLUMNS])
    if "batch_size" in layout.keys:
        result = result.astype({"batch_size": "Int64"})
    result = _beside_paper(_in_paper_order(result, layout), layout)
    return _mark_best(result, layout)


def table1(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> pd.DataFrame:
    """Return Table 1 of these runs: networks with batch normalisation, by schedule and method."""
    return paper_table(LAYOUTS[1], runs, epoch)


def table2(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> pd.DataFrame:
    """Return Table 2 of these runs: networks without batch normalisation, by batch and method."""
    return paper_table(LAYOUTS[2], runs, epoch)


def table3(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> pd.DataFrame:
    """Return Table 3 of these runs: with batch normalisation, schedule × smoothing × α."""
    return paper_table(LAYOUTS[3], runs, epoch)


def fitting_layouts(runs: Sequence[Run]) -> list[Layout]:
    """Return the tables that these runs have rows for; Table 2 where there are none at all."""
    fitting = [
        layout for layout in LAYOUTS.values() if any(_belongs(layout, run, runs) for run in runs)
    ]
    return fitting or [LAYOUTS[2]]


def _belongs(layout: Layout, run: Run, runs: Sequence[Run]) -> bool:
    """Whether a run has its row in a table: Table 2 is of networks without batch normalisation.

    Table 3 has those of the other networks of which the ablation is: ResNet-50, as in the paper,
    and any whose labels some run smoothes.
    """
    config = run.config
    if config is None or not is_batch_normalised(config) or layout.number == 2:
        return layout.number == 2 and not is_batch_normalised(config)
    if layout.number == 1:
        return True
    ablated = {TABLE_3_MODEL} | {
        each.config.model for each in runs if each.config and each.config.label_smoothing
    }
    return config.method in (Method.BASELINE, Method.PGT) and config.model in ablated


def _known(row: Mapping[Any, Any], keys: Sequence[str]) -> tuple[object, ...]:
    """Return a row's values as a key of a set, in which all missing ones are the same."""
    return tuple(None if pd.isna(row[key]) else row[key] for key in keys)


_COLUMNS = [
    "variant", "runs", "note",
    "train_accuracy", "train_spread", "test_accuracy", "test_spread", "gap", "gap_spread",
    "pairs", "train_difference", "train_interval", "test_difference", "test_interval",
    "dead", "filters",
]  # fmt: skip


def _setting(run: Run, keys: Sequence[str]) -> str:
    if run.config is None:
        return "own training loop"
    values = run.config.to_mapping()
    told = {"epochs": "{} epochs", "batch_size": "batch {}", "model": "{}", "dataset": "{}"}
    shown = [
        told.get(key, f"{key.replace('_', ' ')} {{}}").format(values[key])
        for key in keys
        if values[key] not in (None, "auto", "none", 0.0)
    ]
    return ", ".join(shown)


def _with_lr_rule(table: pd.DataFrame, summaries: Sequence[RunSummary]) -> pd.DataFrame:
    """Add to each setting what its learning rates are, and what made them of the batch size."""
    table["own_lr"] = False
    configs = pd.Series([each.run.config for each in summaries], index=table.index, dtype=object)
    for setting, group in table[configs.notna()].groupby("setting"):
        mine: list[RunConfig] = list(configs[group.index])
        rates = {size: {c.peak_lr for c in mine if c.batch_size == size} for size in _sizes(mine)}
        # Where runs of one batch size differ, each row says its own rate.
        if all(len(each) == 1 for each in rates.values()):
            by_size = {size: min(each) for size, each in rates.items()}
            table.loc[group.index, "setting"] = f"{setting}, {_lr_rule(by_size, mine)}"
        else:
            table.loc[group.index, "own_lr"] = True
    return table


def _sizes(configs: Sequence[RunConfig]) -> list[int]:
    return sorted({config.batch_size for config in configs})


def _lr_rule(rates: dict[int, float], configs: Sequence[RunConfig]) -> str:
    first = next(iter(rates))
    shown = ", ".join(f"{lr:g} at {size}" for size, lr in rates.items())
    bases = {(config.lr, config.lr_base_batch) for config in configs if config.lr_base_batch}
    if bases:
        known = {(lr, size) for size, lr in rates.items()}
        told = "".join(f", from {lr:g} at {size}" for lr, size in sorted(bases - known, key=str))
        return f"lr {shown} (linear in the batch size{told})"
    if len(set(rates.values())) == 1:
        return f"lr {rates[first]:g}{' at every batch size' * (len(rates) > 1)} (constant)"
    linear = all(math.isclose(lr * first, rates[first] * size) for size, lr in rates.items())
    return f"lr {shown}" + (" (linear in the batch size)" if linear else " (chosen for each)")


def _cells(table: pd.DataFrame, layout: Layout) -> list[tuple[dict[str, object], pd.DataFrame]]:
    key = ["setting", *layout.keys]
    table["variant"] = ""
    for _, group in table.groupby(key, dropna=False):
        table.loc[group.index, "variant"] = _variants(group)
    key.append("variant")
    return [
        (dict(zip(key, values, strict=True)), group)
        for values, group in table.groupby(key, dropna=False, sort=False)
    ]


def _variants(group: pd.DataFrame) -> list[str]:
    """Name, for each run of a cell, the values that not all of them share; mostly nothing.

    The learning rate also where only the rows of other cells have another one.
    """
    values = (group["recipe"] + group["options"]).tolist()
    keys = RECIPE_KEYS + METHOD_KEYS
    told = {"lr"} if group["own_lr"].any() else set()
    differing = [
        place
        for place, each in enumerate(zip(*values, strict=True))
        if len(set(each)) > 1 or keys[place] in told
    ]
    return [
        ", ".join(f"{keys[place].replace('_', ' ')} {run[place]}" for place in differing)
        for run in values
    ]


def _cell(key: dict[str, object], group: pd.DataFrame) -> dict[str, object]:
    finished = group[group["status"] == "finished"]
    unfinished = group[group["status"] != "finished"]["status"].value_counts()
    counts = ", ".join(f"{count} {status}" for status, count in unfinished.items())
    used = finished
    note = f"left out: {counts}" if counts else ""
    if finished.empty:
        used = group
        note = f"best so far, {counts}" if group["test_accuracy"].notna().any() else counts
    cell = key | {"runs": len(used), "note": note, "filters": int(group["filters"].iloc[0])}
    cell["pairs"] = int(used["test_difference"].notna().sum())
    confounded = {name for names in used["confounded"].dropna() for name in names}
    if confounded:
        said = f"differs from its baseline in {join(sorted(confounded))} too"
        cell["note"] = "; ".join(filter(None, (note, said)))
    cell["dead"] = float(used["dead"].mean())
    cell["gap"] = float(used["gap"].mean())
    cell["gap_spread"] = float(used["gap"].std(ddof=1)) if len(used) > 1 else math.nan
    for part in ("train", "test"):
        accuracy, difference = used[f"{part}_accuracy"], used[f"{part}_difference"].dropna()
        cell[f"{part}_accuracy"] = float(accuracy.mean())
        cell[f"{part}_spread"] = float(accuracy.std(ddof=1)) if len(used) > 1 else math.nan
        cell[f"{part}_difference"] = float(difference.mean()) if len(difference) else math.nan
        cell[f"{part}_interval"] = interval95(difference)
    return cell


def _in_paper_order(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    rows = table.to_dict("records")
    ours = {_known(row, layout.group) for row in rows if row["runs"]}

    def place(index: int) -> tuple[object, ...]:
        row = rows[index]
        only_papers = row["runs"] == 0
        alpha = math.inf if pd.isna(row["alpha"]) else row["alpha"]
        last = (method_place(row["method"]), alpha, row["variant"])
        if layout.by_setting:
            # The plainest setting first: each other one names what it has besides.
            plainest = (row["setting"].count(","), row["setting"])
            return (only_papers, *plainest, *layout.place(row), *last)
        # Groups of which these runs have nothing come last.
        foreign = only_papers and _known(row, layout.group) not in ours
        return (foreign, *layout.place(row), only_papers, row["setting"], *last)

    return table.loc[sorted(range(len(rows)), key=place)].reset_index(drop=True)


def _beside_paper(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    shown = [name for name in ("alpha", *MARKED, "gap") if name in layout.paper]
    paper = layout.paper[list(layout.match)].join(layout.paper[shown].add_prefix("paper_"))
    if "batch_size" in layout.match:
        paper = paper.astype({"batch_size": "Int64"})
    return table.merge(paper, on=list(layout.match), how="left")


def _mark_best(table: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Add best_* (of ours) and best_paper_*: the largest of the setting and group."""
    for column in MARKED:
        for name, group in (
            (column, ["setting", *layout.group]),
            (f"paper_{column}", list(layout.group)),
        ):
            value = table[name].astype(float)
            best = value.groupby([table[key] for key in group], dropna=False).transform("max")
            alone = value.groupby([table[key] for key in group], dropna=False).transform("count")
            # The best of one is no distinction; a difference is one already, being of two runs.
            enough = alone >= (1 if "difference" in name else 2)
            positive = (value > 0) | ("difference" not in name)
            table[f"best_{name}"] = value.notna() & (value == best) & enough & positive
    return table
