"""The paper's Tables 1, 2 and 3, filled from runs, as DataFrames."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pgt_diag.config import Method, RunConfig
from pgt_diag.paper import TABLE_3_MODEL
from reports.intervals import interval95, leaves_zero_out
from reports.layouts import LAYOUTS, Layout, is_batch_normalised, method_place
from reports.roles import METHOD, RECIPE, SETTING, data_label, data_of, trained_with
from reports.source import Run
from reports.summary import Epoch, RunSummary, summarise
from reports.text import join, runs_of_seeds

PAPER_TABLE_2 = LAYOUTS[2].paper
"""Table 2 of the paper: non-BN ResNet-18 on ImageNet-1K, accuracies in percent."""

PAIRED_BY = ["setting", "data", "batch_size", "seed"]
"""The columns that a run and its baseline share."""

OPTIONS = METHOD[2:]
"""A method's own options: with RECIPE, what tells repetitions of a cell from variants."""

MARKED = ("train_accuracy", "test_accuracy", "train_difference", "test_difference")
"""The columns whose best value is marked, as in the paper."""


def runs_table(summaries: Sequence[RunSummary]) -> pd.DataFrame:
    """Return one row per run: setting, batch size, seed, method, alpha, status, accuracies, dead.

    `data` numbers the sets of images that the runs have; runs of other images are other settings.
    Accuracies are those of the epoch that the summaries are made for. A run without a configuration
    has its label as method and no batch size.
    """
    rows = []
    runs = [summary.run for summary in summaries]
    for summary, data in zip(summaries, data_of(runs), strict=True):
        run, accuracy = summary.run, summary.accuracy
        config = run.config
        rows.append(
            {
                "label": summary.label,
                "status": run.status,
                "setting": _setting(run, SETTING),
                "data": data,
                "batch_size": config.batch_size if config else None,
                "seed": config.seed if config else None,
                "method": str(config.method) if config else summary.label,
                "alpha": config.alpha if config and config.method.uses_pgt else math.nan,
                "model": config.model if config else None,
                "schedule": str(config.schedule) if config else None,
                "label_smoothing": config.label_smoothing if config else math.nan,
                "recipe": trained_with(run, RECIPE),
                "options": trained_with(run, OPTIONS),
                "train_accuracy": accuracy.train if accuracy else math.nan,
                "test_accuracy": accuracy.test if accuracy else math.nan,
                "gap": accuracy.train - accuracy.test if accuracy else math.nan,
                "dead": summary.dead,
                "unknown": len(summary.unknown),
                "filters": summary.filters,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"batch_size": "Int64", "seed": "Int64"}) if rows else table


def paired_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Return, for each run, its difference to the baseline of the same setting, data, batch, seed.

    table: as `runs_table` makes it, finished runs only. Of several such baselines those with the
    run's own recipe (learning rate and so on) are meant; without one, all if they share a recipe,
    and none otherwise. Columns train_difference, test_difference and dead_difference, NaN for
    baselines and where no baseline matches, and confounded: names of RECIPE that differ. The
    difference in dead filters is NaN, too, where it is unknown whether some of them are dead.
    """
    names = {"train_accuracy": "train", "test_accuracy": "test", "dead": "dead"}
    columns = [f"{name}_difference" for name in names.values()]
    differences = pd.DataFrame(math.nan, index=table.index, columns=columns)
    confounded: dict[object, tuple[str, ...]] = {}
    baselines = dict(list(table[table["method"] == "baseline"].groupby(PAIRED_BY)))
    for row, run in table[table["method"] != "baseline"].iterrows():
        found = baselines.get(tuple(run[PAIRED_BY]))
        if found is None:
            continue
        same = found[found["recipe"] == run["recipe"]]
        if same.empty and found["recipe"].nunique() > 1:
            continue
        chosen = found if same.empty else same
        for value, name in names.items():
            differences.loc[row, f"{name}_difference"] = run[value] - chosen[value].mean()
        if run["unknown"] or chosen["unknown"].any():
            differences.loc[row, "dead_difference"] = math.nan
        pairs = zip(RECIPE, run["recipe"], chosen["recipe"].iloc[0], strict=True)
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
        table["setting"] = _settings([each.run for each in summaries], layout)
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
    return _mark_best(result, ours, layout)


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
    "variant", "runs", "seeds", "note",
    "train_accuracy", "train_spread", "test_accuracy", "test_spread", "gap", "gap_spread",
    "pairs", "train_difference", "train_interval", "test_difference", "test_interval",
    "dead", "unknown", "filters",
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


def _settings(runs: Sequence[Run], layout: Layout) -> list[str]:
    """Return each run's setting, and of what data it is where others with that setting differ."""
    plain = [_setting(run, layout.setting) for run in runs]
    data = data_of(runs)
    told = []
    for run, setting, number in zip(runs, plain, data, strict=True):
        others = [
            other
            for other, theirs, place in zip(runs, plain, data, strict=True)
            if theirs == setting and place != number
        ]
        told.append(f"{setting}, {data_label(run, others)}" if others and run.config else setting)
    return told


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
    keys = RECIPE + OPTIONS
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
    notes = [f"left out: {counts}" if counts else ""]
    if finished.empty:
        used = group
        notes = [f"best so far, {counts}" if group["test_accuracy"].notna().any() else counts]
    confounded = {name for names in used["confounded"].dropna() for name in names}
    if confounded:
        notes.append(f"differs from its baseline in {join(sorted(confounded))} too")
    # Runs of one seed are one observation, however often it was repeated.
    numbers = used.select_dtypes("number").drop(columns="seed").astype(float)
    seeds = numbers.groupby(used["seed"].astype(object).fillna(-1)).mean()
    if len(seeds) < len(used):
        notes.append(runs_of_seeds(len(used), len(seeds)))
    note = "; ".join(filter(None, notes))
    cell = key | {"runs": len(used), "note": note, "filters": int(group["filters"].iloc[0])}
    cell |= {"seeds": len(seeds), "pairs": int(seeds["test_difference"].notna().sum())}
    cell |= {name: float(seeds[name].mean()) for name in ("dead", "unknown", "gap")}
    cell["gap_spread"] = float(seeds["gap"].std(ddof=1))
    for part in ("train", "test"):
        accuracy, difference = seeds[f"{part}_accuracy"], seeds[f"{part}_difference"].dropna()
        cell[f"{part}_accuracy"] = float(accuracy.mean())
        cell[f"{part}_spread"] = float(accuracy.std(ddof=1))
        cell[f"{part}_difference"] = float(difference.mean())
        cell[f"{part}_interval"] = interval95(difference)
        cell[f"{part}_gains"] = leaves_zero_out(difference) and float(difference.mean()) > 0
        cell[f"{part}_by_seed"] = accuracy
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


def _mark_best(table: pd.DataFrame, ours: Sequence[dict[str, Any]], layout: Layout) -> pd.DataFrame:
    """Add best_* (of ours) and best_paper_*: the largest of the setting and group.

    One of ours is the best only where it is more than chance: over the seeds that it shares with
    each of the others, the 95 % interval of its difference leaves 0 out; for a gain, that of the
    gain as well. The paper's own are marked as it marks them.
    """
    by_row = {_row_key(row, layout): row for row in ours}
    rows = [by_row.get(_row_key(row, layout)) for row in table.to_dict("records")]
    for part in ("train", "test"):
        clear = [
            row is not None and _clearly_best(row, part, ours, layout, least=1) for row in rows
        ]
        table[f"best_{part}_accuracy"] = clear
        table[f"best_{part}_difference"] = [
            row is not None and row[f"{part}_gains"] and _clearly_best(row, part, others, layout)
            for row in rows
            for others in [[each for each in ours if each["method"] != Method.BASELINE]]
        ]
    for column in MARKED:
        value = table[f"paper_{column}"].astype(float)
        best = value.groupby([table[key] for key in layout.group], dropna=False).transform("max")
        alone = value.groupby([table[key] for key in layout.group], dropna=False).transform("count")
        # The best of one is no distinction; a difference is one already, being of two runs.
        enough = alone >= (1 if "difference" in column else 2)
        positive = (value > 0) | ("difference" not in column)
        table[f"best_paper_{column}"] = value.notna() & (value == best) & enough & positive
    return table


def _row_key(row: Mapping[Any, Any], layout: Layout) -> tuple[object, ...]:
    return _known(row, ("setting", *layout.keys, "variant"))


def _clearly_best(
    row: Mapping[Any, Any],
    part: str,
    rows: Sequence[Mapping[Any, Any]],
    layout: Layout,
    least: int = 0,
) -> bool:
    """Whether a row's accuracy is above that of every other, at `least` so many, of its group."""
    group = ("setting", *layout.group)
    others = [
        each for each in rows if each is not row and _known(each, group) == _known(row, group)
    ]
    values = row[f"{part}_by_seed"]
    apart = [(values - each[f"{part}_by_seed"]).dropna() for each in others]
    return len(apart) >= least and all(leaves_zero_out(each) and each.mean() > 0 for each in apart)
