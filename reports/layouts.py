"""How the paper lays out its tables: what names a row, what is compared within, what it printed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pgt_diag.config import Method, Norm, RunConfig
from pgt_diag.paper import TABLE_1, TABLE_2, TABLE_3, TABLE_3_MODEL
from reports.roles import SETTING
from reports.text import METHOD_NAMES

_KEYS = ("model", "schedule", "label_smoothing", "method", "alpha")
_DIFFERENCES = ("train_accuracy", "train_difference", "test_accuracy", "test_difference")
_ELSEWHERE = 99
"""The place of what the paper does not have, after all that it has."""


@dataclass(frozen=True, eq=False)
class Layout:
    """One of the paper's tables of accuracies, as it is filled from runs.

    keys: columns that name a row, beside its setting; heads: those of them that are printed.
    match: columns on which our rows and the paper's are the same. group: columns within which
    differences are compared and the best is marked. setting: what the configuration says of it.
    `values` and `paper_values` are printed, in this order.
    """

    number: int
    title: str
    note: str
    keys: tuple[str, ...]
    heads: tuple[str, ...]
    match: tuple[str, ...]
    group: tuple[str, ...]
    setting: tuple[str, ...]
    values: tuple[str, ...]
    paper_values: tuple[str, ...]
    paper: pd.DataFrame = field(repr=False)
    place: Callable[[Mapping[Any, Any]], tuple[Any, ...]] = field(repr=False)
    """The order of groups and rows, from a row's values."""
    by_setting: bool
    """Whether rows are put together by setting first, and the paper's own come last."""

    @property
    def anchor(self) -> str:
        """The table's name in addresses, files and JSON: `table2`."""
        return f"table{self.number}"

    @property
    def name(self) -> str:
        """The table's name for people: `Table 2`."""
        return f"Table {self.number}"


def is_batch_normalised(config: RunConfig | None) -> bool:
    """Whether a run belongs to the paper's networks with batch normalisation: Tables 1 and 3."""
    return config is not None and config.norm is Norm.BATCH


def method_place(method: object) -> int:
    """Return a method's place in the paper's order; what is no method comes after."""
    order = [str(each) for each in METHOD_NAMES]
    return order.index(str(method)) if str(method) in order else len(order)


def _table_2() -> pd.DataFrame:
    columns = ["batch_size", "method", "alpha", "train_accuracy", "test_accuracy"]
    return _with_differences(pd.DataFrame(TABLE_2, columns=columns), ["batch_size"])


def _table_1() -> pd.DataFrame:
    columns = ["model", "schedule", "method", "alpha", "train_accuracy", "test_accuracy"]
    table = pd.DataFrame(TABLE_1, columns=columns).assign(label_smoothing=0.0)
    return _with_differences(table, ["model", "schedule"])


def _table_3() -> pd.DataFrame:
    columns = ["schedule", "label_smoothing", "method", "alpha", "train_accuracy", "test_accuracy"]
    table = pd.DataFrame(TABLE_3, columns=columns).assign(model=TABLE_3_MODEL)
    table = _with_differences(table, ["schedule", "label_smoothing"])
    return table.assign(gap=(table["train_accuracy"] - table["test_accuracy"]).round(3))


def _with_differences(table: pd.DataFrame, group: list[str]) -> pd.DataFrame:
    """Add the differences to the baseline of the same group, and plain text for the choices."""
    for name in {"method", "schedule"} & set(table.columns):
        table[name] = table[name].map(str)
    baseline = table["method"] == Method.BASELINE
    for part in ("train", "test"):
        accuracy = table[f"{part}_accuracy"]
        start = accuracy.where(baseline).groupby([table[key] for key in group]).transform("first")
        table[f"{part}_difference"] = (accuracy - start).round(3).mask(baseline)
    return table


def _place_2(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    size = row["batch_size"]
    return (math.inf if pd.isna(size) else -int(size),)


def _place_1(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    papers = list(dict.fromkeys((model, str(schedule)) for model, schedule, *_ in TABLE_1))
    network = (str(row["model"]), str(row["schedule"]))
    known = papers.index(network) if network in papers else _ELSEWHERE
    return (known, network, row["label_smoothing"])


def _place_3(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    # In the paper's order: NaN is not equal to itself, so α is compared as text.
    papers = [(str(each[0]), each[1], str(each[2]), str(each[3])) for each in TABLE_3]
    mine = (str(row["schedule"]), row["label_smoothing"], str(row["method"]), str(row["alpha"]))
    known = papers.index(mine) if mine in papers else _ELSEWHERE
    return (row["model"] != TABLE_3_MODEL, str(row["model"]), known, mine[:2])


LAYOUTS = {
    1: Layout(
        number=1,
        title="Networks with batch normalisation, beside the paper's",
        note="PGT against the baseline of the same network and schedule.",
        keys=_KEYS,
        heads=("model", "schedule", "method", "alpha"),
        match=_KEYS,
        group=("model", "schedule", "label_smoothing"),
        setting=("dataset", "epochs", "batch_size", "label_smoothing", *SETTING[4:]),
        values=_DIFFERENCES,
        paper_values=_DIFFERENCES,
        paper=_table_1(),
        place=_place_1,
        by_setting=True,
    ),
    2: Layout(
        number=2,
        title="Accuracy by batch size and method, beside the paper's",
        note="",
        keys=("batch_size", "method", "alpha"),
        heads=("batch_size", "method", "alpha"),
        match=("batch_size", "method"),
        group=("batch_size",),
        setting=SETTING,
        values=_DIFFERENCES,
        paper_values=_DIFFERENCES,
        paper=_table_2(),
        place=_place_2,
        by_setting=False,
    ),
    3: Layout(
        number=3,
        title="Schedule × label smoothing × α, beside the paper's",
        note="Differences are to the baseline of the same schedule and smoothing; the gap is train "
        "minus test, of augmented against plain images.",
        keys=_KEYS,
        heads=("schedule", "label_smoothing", "method", "alpha"),
        match=_KEYS,
        group=("model",),
        setting=("model", "dataset", "epochs", "batch_size", *SETTING[4:]),
        values=("train_accuracy", "test_accuracy", "test_difference", "gap"),
        paper_values=("train_accuracy", "test_accuracy", "gap"),
        paper=_table_3(),
        place=_place_3,
        by_setting=True,
    ),
}
"""By the paper's number."""
