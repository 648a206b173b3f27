"""Table 2 and the other tables of a report, as DataFrames."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from pgt_diag.paper import TABLE_2
from reports.source import Run
from reports.summary import RunSummary, summarise
from reports.text import METHOD_NAMES, join


def _paper_table() -> pd.DataFrame:
    table = pd.DataFrame(
        TABLE_2,
        columns=["batch_size", "method", "alpha", "train_accuracy", "test_accuracy"],
    )
    table["method"] = [str(method) for method in table["method"]]
    baseline = table[table["method"] == "baseline"].set_index("batch_size")
    for part in ("train", "test"):
        start = table["batch_size"].map(baseline[f"{part}_accuracy"])
        difference = (table[f"{part}_accuracy"] - start).round(3)
        table[f"{part}_difference"] = difference.mask(table["method"] == "baseline")
    return table


PAPER_TABLE_2 = _paper_table()
"""Table 2 of the paper: non-BN ResNet-18 on ImageNet-1K, accuracies in percent."""

SETTING_KEYS = ("dataset", "model", "norm", "stem", "image_size", "augment", "epochs")
"""What two runs must share, beside batch size and seed, for their difference to mean the method."""

RECIPE_KEYS = (
    "lr", "weight_decay", "momentum", "nesterov", "decay_biases", "schedule", "step_epochs",
    "warmup_epochs", "warmup_lr", "min_lr", "label_smoothing",
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

    Accuracies are those of the epoch with the best test accuracy. A run without a configuration
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
                "setting": _setting(run),
                "batch_size": config.batch_size if config else None,
                "seed": config.seed if config else None,
                "method": str(config.method) if config else summary.label,
                "alpha": config.alpha if config and config.method.uses_pgt else math.nan,
                "recipe": _values(run, RECIPE_KEYS),
                "options": _values(run, METHOD_KEYS),
                "train_accuracy": accuracy.train if accuracy else math.nan,
                "test_accuracy": accuracy.test if accuracy else math.nan,
                "dead": summary.dead,
                "filters": summary.filters,
            }
        )
    table = pd.DataFrame(rows)
    return table.astype({"batch_size": "Int64", "seed": "Int64"}) if rows else table


def _values(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(getattr(run.config, key)) for key in keys) if run.config else ()


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


def table2(runs: Sequence[Run]) -> pd.DataFrame:
    """Return Table 2 of these runs, the paper's values beside them.

    One row per setting, batch size (largest first, those that only the paper has last), method (in
    the paper's order), α and `variant` (the learning rate and so on, where runs of a cell differ
    in more than the seed). Means and spreads (standard deviation) over the finished runs;
    differences are means over pairs with the baseline of the same setting, batch size and seed,
    with the half-width of their 95 % interval; see `paired_differences`. `note` says what was left
    out or differs besides the method. Rows with `runs` 0 are cells of the paper that these
    runs do not have. `best_*` marks the best of each setting and batch size.
    """
    table = _with_lr_rule(runs_table(summarise(runs)))
    ours = [_cell(key, group) for key, group in _cells(table)]
    have = {(row["batch_size"], row["method"]) for row in ours}
    missing: list[dict[str, object]] = [
        {
            "batch_size": row.batch_size,
            "method": row.method,
            "runs": 0,
            "note": "not run",
            "setting": "",
            "variant": "",
        }
        for row in PAPER_TABLE_2.itertuples()
        if (row.batch_size, row.method) not in have
    ]
    result = pd.DataFrame(ours + missing, columns=_COLUMNS)
    result = _beside_paper(_in_paper_order(result))
    return _mark_best(result)


_COLUMNS = [
    "setting", "batch_size", "method", "alpha", "variant", "runs", "note",
    "train_accuracy", "train_spread", "test_accuracy", "test_spread",
    "pairs", "train_difference", "train_interval", "test_difference", "test_interval",
    "dead", "filters",
]  # fmt: skip


def _setting(run: Run) -> str:
    if run.config is None:
        return "own training loop"
    values = run.config.to_mapping()
    shown = [values["model"], values["dataset"], f"{values['epochs']} epochs"]
    shown += [
        f"{key} {values[key]}"
        for key in SETTING_KEYS
        if key not in ("model", "dataset", "epochs") and values[key] not in (None, "auto", "none")
    ]
    return ", ".join(str(value) for value in shown)


def _with_lr_rule(table: pd.DataFrame) -> pd.DataFrame:
    """Add to each setting of several batch sizes how their learning rates are related."""
    if table.empty:
        return table
    place = RECIPE_KEYS.index("lr")
    for setting, group in table[table["recipe"].map(len) > 0].groupby("setting"):
        rates: dict[int, set[float]] = {}
        for size, recipe in zip(group["batch_size"], group["recipe"], strict=True):
            rates.setdefault(int(size), set()).add(float(recipe[place]))
        # Where runs of one batch size differ, each row says its own rate.
        if len(rates) > 1 and all(len(each) == 1 for each in rates.values()):
            by_size = {size: min(rates[size]) for size in sorted(rates)}
            table.loc[group.index, "setting"] = f"{setting}, {_lr_rule(by_size)}"
    return table


def _lr_rule(rates: dict[int, float]) -> str:
    first = next(iter(rates))
    if len(set(rates.values())) == 1:
        return f"lr {rates[first]:g} at every batch size (constant)"
    shown = ", ".join(f"{lr:g} at {size}" for size, lr in rates.items())
    linear = all(math.isclose(lr * first, rates[first] * size) for size, lr in rates.items())
    return f"lr {shown}" + (" (linear in the batch size)" if linear else "")


def _cells(table: pd.DataFrame) -> list[tuple[dict[str, object], pd.DataFrame]]:
    if table.empty:
        return []
    usable = table[table["status"] == "finished"]
    table = table.join(paired_differences(usable))
    key = ["setting", "batch_size", "method", "alpha"]
    table["variant"] = ""
    for _, group in table.groupby(key, dropna=False):
        table.loc[group.index, "variant"] = _variants(group)
    key.append("variant")
    return [
        (dict(zip(key, values, strict=True)), group)
        for values, group in table.groupby(key, dropna=False, sort=False)
    ]


def _variants(group: pd.DataFrame) -> list[str]:
    """Name, for each run of a cell, the values that not all of them share; mostly nothing."""
    values = (group["recipe"] + group["options"]).tolist()
    keys = RECIPE_KEYS + METHOD_KEYS
    differing = [
        place for place, each in enumerate(zip(*values, strict=True)) if len(set(each)) > 1
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
        used, note = group, f"best so far, {counts}"
    cell = key | {"runs": len(used), "note": note, "filters": int(group["filters"].iloc[0])}
    cell["pairs"] = int(used["test_difference"].notna().sum())
    confounded = {name for names in used["confounded"].dropna() for name in names}
    if confounded:
        said = f"differs from its baseline in {join(sorted(confounded))} too"
        cell["note"] = "; ".join(filter(None, (note, said)))
    cell["dead"] = float(used["dead"].mean())
    for part in ("train", "test"):
        accuracy, difference = used[f"{part}_accuracy"], used[f"{part}_difference"].dropna()
        cell[f"{part}_accuracy"] = float(accuracy.mean())
        cell[f"{part}_spread"] = float(accuracy.std(ddof=1)) if len(used) > 1 else math.nan
        cell[f"{part}_difference"] = float(difference.mean()) if len(difference) else math.nan
        cell[f"{part}_interval"] = interval95(difference)
    return cell


def _in_paper_order(table: pd.DataFrame) -> pd.DataFrame:
    order = {str(method): place for place, method in enumerate(METHOD_NAMES)}
    ours = set(table.loc[table["runs"] > 0, "batch_size"].dropna())
    return (
        table.assign(
            # Batch sizes of which these runs have nothing come last.
            _foreign=(table["runs"] == 0) & ~table["batch_size"].isin(ours),
            _paper=table["runs"] == 0,
            _place=table["method"].map(order).fillna(len(order)),
            batch_size=table["batch_size"].astype("Int64"),
        )
        .sort_values(
            ["_foreign", "batch_size", "_paper", "setting", "_place", "alpha", "variant"],
            ascending=[True, False, True, True, True, True, True],
            ignore_index=True,
        )
        .drop(columns=["_foreign", "_paper", "_place"])
    )


def _beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    paper = PAPER_TABLE_2.rename(
        columns={name: f"paper_{name}" for name in ("alpha", *MARKED)}
    ).astype({"batch_size": "Int64"})
    return table.merge(paper, on=["batch_size", "method"], how="left")


def _mark_best(table: pd.DataFrame) -> pd.DataFrame:
    """Add best_* (of ours) and best_paper_*: the largest of the setting and batch size."""
    for column in MARKED:
        for name, group in (
            (column, ["setting", "batch_size"]),
            (f"paper_{column}", ["batch_size"]),
        ):
            value = table[name].astype(float)
            best = value.groupby([table[key] for key in group], dropna=False).transform("max")
            alone = value.groupby([table[key] for key in group], dropna=False).transform("count")
            # The best of one is no distinction; a difference is one already, being of two runs.
            enough = alone >= (1 if "difference" in name else 2)
            positive = (value > 0) | ("difference" not in name)
            table[f"best_{name}"] = value.notna() & (value == best) & enough & positive
    return table
