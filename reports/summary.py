"""What one run amounts to, in numbers: deaths, revivals, accuracy, decay budget. No words yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import pandas as pd

from pgt_diag.filters import DeathCounts, count_deaths, death_window, deaths, decay_budget
from pgt_diag.reading import is_count
from reports.source import Run
from reports.text import run_labels

NORM_TEST_BUDGET = math.log(100)
"""Decay budget at which a dead filter's norm reaches 1e-2 of its value (ln 100 ≈ 4.6)."""


class Epoch(StrEnum):
    """Which epoch's accuracies a run is told by: the best test accuracy's, or the last.

    The authors' code reports the best. It chooses by the images it reports on, so it flatters.
    """

    BEST = "best"
    LAST = "last"


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in percent of one epoch.

    `epoch` counts from 1, as people do; metrics.csv counts from 0.
    """

    train: float
    test: float
    epoch: int


@dataclass(frozen=True)
class Death:
    """One row of the table of deaths, in plain Python values; `revival` is None while it lasts."""

    layer: str
    layer_index: int
    filter: int
    iteration: int
    revival: int | None
    cause: str


@dataclass(frozen=True)
class RunSummary:
    """One run with its label in this report and everything derived from its event log."""

    run: Run
    label: str
    epoch: Epoch = Epoch.BEST

    @cached_property
    def window(self) -> int:
        """How many iterations a filter must be dead to count; `pgt_diag.filters.death_window`."""
        planned, min_spell = (
            value if is_count(value) else 0
            for value in map(self.run.info.get, ("planned_iterations", "min_spell"))
        )
        return death_window(planned or self.run.iteration_count, min_spell)

    @cached_property
    def deaths(self) -> pd.DataFrame:
        """One row per death; see `pgt_diag.filters.deaths`."""
        return deaths(self.run.events, self.run.iteration_count, self.window)

    @cached_property
    def counts(self) -> DeathCounts:
        """How often the filters died; every count on a page is one of these."""
        return count_deaths(self.deaths)

    @cached_property
    def lasting(self) -> pd.DataFrame:
        """The deaths that last to the end, one row per filter."""
        return self.deaths[self.deaths["revival_iteration"].isna()]

    @cached_property
    def revived(self) -> pd.DataFrame:
        """The deaths that ended before the run did."""
        return self.deaths[self.deaths["revival_iteration"].notna()]

    @cached_property
    def possible(self) -> pd.DataFrame:
        """The deaths there were if all that could not be seen was silent or without gradient."""
        unseen = self.run.unknown_spells
        if unseen.empty:
            return self.deaths
        events = pd.concat([self.run.events, unseen], ignore_index=True)
        return deaths(events, self.run.iteration_count, self.window)

    @cached_property
    def unknown(self) -> pd.DataFrame:
        """The filters of which nobody can tell whether they are dead at the end, a row each."""
        maybe = self.possible[self.possible["revival_iteration"].isna()]
        return _without(maybe, self.lasting)

    @cached_property
    def undecided(self) -> pd.DataFrame:
        """The filters of which nobody can tell whether they ever died, a row each."""
        return _without(self.possible, self.deaths)

    @property
    def filters(self) -> int:
        """Number of filters of all convolutions."""
        return sum(layer.filters for layer in self.run.layers)

    @property
    def dead(self) -> int:
        """Number of filters dead at the end."""
        return self.counts.dead

    @cached_property
    def never_alive(self) -> pd.DataFrame:
        """The deaths by silence that began with the very first iteration: no norm fell there."""
        at_start = (self.deaths["iteration"] == 0) & (self.deaths["cause"] == "silent")
        return self.deaths[at_start]

    @property
    def silent_from_start(self) -> int:
        """Number of filters dead at the end that no batch ever saw alive."""
        return int(self.lasting.index.isin(self.never_alive.index).sum())

    @property
    def first_death(self) -> Death | None:
        """The earliest death of a filter that had lived, whether or not it came back."""
        born_dead = set(self.never_alive.index)
        later = (death for row, death in enumerate(self.death_list) if row not in born_dead)
        return next(later, None)

    @cached_property
    def death_list(self) -> list[Death]:
        """The table of deaths as plain values, in order of iteration."""
        revivals = self.deaths["revival_iteration"].astype(object)
        return [
            Death(
                str(row["layer"]),
                int(row["layer_index"]),
                int(row["filter"]),
                int(row["iteration"]),
                None if pd.isna(revival) else int(revival),
                str(row["cause"]),
            )
            for row, revival in zip(self.deaths.to_dict("records"), revivals, strict=True)
        ]

    @cached_property
    def by_layer(self) -> pd.DataFrame:
        """One row per layer: index, filters, dead, silent_from_start, deaths, revivals, died,
        unknown, first_death.

        `silent_from_start` counts those of the dead that were never alive; `deaths` is `dead` plus
        `revivals`, and `died` the filters that they are of; `first_death` (Int64) is the earliest
        of a filter that had lived.
        """
        layers = self.run.layers
        table = pd.DataFrame(
            {
                "index": [layer.index for layer in layers],
                "filters": [layer.filters for layer in layers],
            },
            index=pd.Index([layer.name for layer in layers], name="layer"),
        )
        never = self.lasting.index.isin(self.never_alive.index)
        counted = {
            "dead": self.lasting,
            "silent_from_start": self.lasting[never],
            "deaths": self.deaths,
            "revivals": self.revived,
            "died": self.deaths.drop_duplicates(["layer", "filter"]),
            "unknown": self.unknown,
        }
        for name, rows in counted.items():
            table[name] = rows.groupby("layer").size().reindex(table.index).fillna(0).astype(int)
        later = self.deaths.drop(index=self.never_alive.index)
        first = later.groupby("layer")["iteration"].min().reindex(table.index)
        table["first_death"] = first.astype("Int64")
        return table

    @cached_property
    def accuracy(self) -> Accuracy | None:
        """Accuracy at the best epoch (or the last), or None where no epoch was tested."""
        metrics = self.run.metrics
        if metrics.empty or "test_accuracy" not in metrics or metrics["test_accuracy"].isna().all():
            return None
        tested = metrics["test_accuracy"].to_numpy(np.float64)
        last = int(np.flatnonzero(~np.isnan(tested))[-1])
        best = metrics.iloc[last if self.epoch is Epoch.LAST else int(np.nanargmax(tested))]
        train = float(best["train_accuracy"]) if "train_accuracy" in metrics else math.nan
        return Accuracy(train, float(best["test_accuracy"]), int(best.get("epoch", best.name)) + 1)

    def budget_since(self, iteration: int) -> float | None:
        """Return Σ lr·wd/(1−μ) from an iteration to the end; None when it is not known."""
        config, iterations = self.run.config, self.run.iterations
        if config is None or iterations.empty or iterations["lr"].isna().all():
            return None
        lr = iterations["lr"].to_numpy(np.float64)
        return decay_budget(lr, config.weight_decay, config.momentum, iteration)


def summarise(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> list[RunSummary]:
    """Label the runs and pair each with its summary.

    Two runs are put in the paper's order, baseline first; more keep the order they came in.
    """
    if len(runs) == 2:
        runs = sorted(runs, key=_is_not_baseline)
    labels = run_labels(runs)
    return [RunSummary(run, label, epoch) for run, label in zip(runs, labels, strict=True)]


def _without(filters: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each filter of one table of deaths that the other does not have."""
    key = ["layer_index", "filter"]
    rows = filters.drop_duplicates(key)
    return rows[~pd.MultiIndex.from_frame(rows[key]).isin(pd.MultiIndex.from_frame(others[key]))]


def _is_not_baseline(run: Run) -> bool:
    return run.config is None or run.config.method != "baseline"
