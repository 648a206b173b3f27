"""What happened to the filters: states, spells, deaths, revivals, the decay budget.

Pure functions and one small accumulator, all on arrays and tables: nothing here touches a model
or a file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

EVENT_KINDS = ("silent", "zero_gradient", "collapsed", "zeroed")
COLLAPSED_RATIO = 1e-2
ZEROED_RATIO = 1e-3
MIN_DEATH_WINDOW = 10
"""A filter that is silent or collapsed for fewer iterations is never counted as dead."""

Spells = NDArray[np.int64]
"""Rows (kind, filter, start, end): end is the first iteration after it, or −1 while it lasts."""


def filter_states(
    activity: NDArray[np.float32],
    gradient_norms: NDArray[np.float32],
    weight_norms: NDArray[np.float32],
    initial_norms: NDArray[np.float32],
    collapsed_ratio: float = COLLAPSED_RATIO,
    zeroed_ratio: float = ZEROED_RATIO,
    before: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Return which of EVENT_KINDS hold, for every iteration and filter.

    All inputs are (T, F), `initial_norms` (F,). `activity` is any non-negative measure of a
    channel's map over the batch that is 0 exactly when the whole map is. Where a measure is NaN
    (unknown), a state is as it was at the iteration before: not seeing a filter neither kills nor
    revives it. `before`, (kinds, F), is what held before the first iteration; by default nothing.
    A filter whose initial norm is 0 never counts as collapsed. Returns (kinds, T, F) bool.
    """
    states = np.empty((len(EVENT_KINDS), *activity.shape), dtype=bool)
    np.equal(activity, 0, out=states[0])
    np.equal(gradient_norms, 0, out=states[1])
    np.less(weight_norms, np.float32(collapsed_ratio) * initial_norms, out=states[2])
    if collapsed_ratio >= zeroed_ratio and not states[2].any():
        states[3] = False
    else:
        np.less(weight_norms, np.float32(zeroed_ratio) * initial_norms, out=states[3])
    held = before if before is not None else np.zeros(states[:, 0].shape, dtype=bool)
    for kind, measure in enumerate((activity, gradient_norms, weight_norms, weight_norms)):
        unknown = np.isnan(measure)
        for row in np.flatnonzero(unknown.any(axis=1)):
            last = states[kind, row - 1] if row else held[kind]
            np.copyto(states[kind, row], last, where=unknown[row])
    return states


class SpellTracker:
    """Turns filter states, block by block, into spells: maximal runs of iterations in a state.

    A spell is reported once it has lasted `min_spell` iterations, with end −1, and again with its
    end when it is over; shorter ones are only counted, in `brief` (kinds, F).
    """

    def __init__(self, filters: int, min_spell: int = 1) -> None:
        self.min_spell = min_spell
        self.brief = np.zeros((len(EVENT_KINDS), filters), dtype=np.int64)
        self._since = np.full((len(EVENT_KINDS), filters), -1, dtype=np.int64)
        self._reported = np.zeros((len(EVENT_KINDS), filters), dtype=bool)
        self._next_iteration = 0

    @property
    def holding(self) -> NDArray[np.bool_]:
        """Which states held at the last iteration, (kinds, F) bool."""
        held: NDArray[np.bool_] = self._since >= 0
        return held

    def dead_filters(self, window: int) -> int:
        """Count the filters that are dead now, as `deaths` will find them if the run ends here."""
        silent, zero_gradient, collapsed, _ = self._since
        quiet = np.where((silent < 0) | (zero_gradient < 0), -1, np.maximum(silent, zero_gradient))
        latest = self._next_iteration - window
        return int((_within(quiet, latest) | _within(collapsed, latest)).sum())

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on from here: the spells that last, and the counts."""
        return {
            "brief": self.brief,
            "since": self._since,
            "reported": self._reported,
            "next_iteration": self._next_iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of as many filters; ValueError when they differ."""
        arrays = [np.array(state[name]) for name in ("brief", "since", "reported")]
        if any(array.shape != self.brief.shape for array in arrays):
            raise ValueError(f"spells of {arrays[0].shape[-1]} filters, not {self.brief.shape[-1]}")
        self.brief, self._since = (array.astype(np.int64) for array in arrays[:2])
        self._reported = arrays[2].astype(bool)
        self._next_iteration = int(state["next_iteration"])

    def update(self, states: NDArray[np.bool_]) -> Spells:
        """Take the states of the next T iterations, (kinds, T, F); return new and ended spells."""
        _, length, filters = states.shape
        first, self._next_iteration = self._next_iteration, self._next_iteration + length
        if length == 0:
            return np.empty((0, 4), dtype=np.int64)
        since, reported = self._since.ravel(), self._reported.ravel()
        # Filters rarely change their state: only the changes are looked at one by one.
        changed = np.empty_like(states)
        np.not_equal(states[:, 0], self._since >= 0, out=changed[:, 0])
        np.not_equal(states[:, 1:], states[:, :-1], out=changed[:, 1:])
        places = np.flatnonzero(changed)
        begins = states.ravel()[places]
        rest, index = np.divmod(places, filters)
        kind, time = np.divmod(rest, length)
        row = kind * filters + index
        order = np.argsort(row, kind="stable")
        row, begins, time = row[order], begins[order], first + time[order]
        same = np.diff(row, prepend=-1) == 0

        ends = np.flatnonzero(~begins)
        ended = row[ends]
        start = np.where(same[ends], np.roll(time, 1)[ends], since[ended])
        long = time[ends] - start >= self.min_spell
        np.add.at(self.brief.ravel(), ended[~long], 1)
        closed = (ended[long], start[long], time[ends][long])

        last = np.flatnonzero(np.diff(row, append=-1) != 0)
        reported[row] = False
        since[row[last]] = np.where(begins[last], time[last], -1)
        lasting = np.flatnonzero(
            (since >= 0) & ~reported & (since <= self._next_iteration - self.min_spell)
        )
        reported[lasting] = True
        rows, starts, finishes = (
            np.concatenate(pair)
            for pair in zip(
                closed, (lasting, since[lasting], np.full(len(lasting), -1)), strict=True
            )
        )
        return np.stack((*np.divmod(rows, filters), starts, finishes), axis=1)


def _within(since: NDArray[np.int64], latest: int) -> NDArray[np.bool_]:
    """Whether a spell lasts (−1: none does) that began at `latest` or before."""
    lasting: NDArray[np.bool_] = (since >= 0) & (since <= latest)
    return lasting


def death_window(iterations: int, min_spell: int = 1) -> int:
    """Return how many iterations a filter must be dead to count: 1 % of the run, at least 10.

    `iterations` is how long the run is planned to be or, where nobody planned it, has been so far.
    No fewer than `min_spell` either: the event log has no shorter spells.
    """
    return max(MIN_DEATH_WINDOW, iterations // 100, min_spell)


_FILTER = ["layer", "layer_index", "filter"]


def deaths(
    events: "pd.DataFrame", iteration_count: int, window: int | None = None
) -> "pd.DataFrame":
    """Derive deaths and revivals from an event log.

    A filter is dead while its channel is silent and its gradient exactly zero at once, and while
    its weight norm is under 1e-2 of its start; each for at least `window` iterations (default
    `death_window`). Intervals of a filter that overlap or touch are one death, so that every death
    ends in a revival or lasts to the end. `cause` is what began it: "silent" or "collapsed".

    Returns one row per death, in order of iteration: layer, layer_index, filter, iteration,
    revival_iteration (Int64; NA while it lasts), cause.
    """
    import pandas as pd

    window = death_window(iteration_count) if window is None else window
    spells = events.assign(
        end=events["end_iteration"].astype("Int64").fillna(iteration_count).astype("int64")
    ).rename(columns={"start_iteration": "iteration"})
    spells = spells[spells["end"] - spells["iteration"] >= window]
    of_kind = {kind: spells[spells["kind"] == kind] for kind in EVENT_KINDS}

    both = of_kind["silent"].merge(of_kind["zero_gradient"], on=_FILTER, suffixes=("", "_gradient"))
    silent = both[_FILTER].assign(
        iteration=both[["iteration", "iteration_gradient"]].max(axis=1),
        end=both[["end", "end_gradient"]].min(axis=1),
        cause="silent",
    )
    silent = silent[silent["end"] - silent["iteration"] >= window]
    collapsed = of_kind["collapsed"][[*_FILTER, "iteration", "end"]].assign(cause="collapsed")

    result = _joined(pd.concat([silent, collapsed], ignore_index=True))
    result = result.sort_values(["iteration", "layer_index", "filter"], ignore_index=True)
    ended = result["end"].astype("Int64")
    result["revival_iteration"] = ended.mask(ended >= iteration_count)
    return result[[*_FILTER, "iteration", "revival_iteration", "cause"]]


def _joined(intervals: "pd.DataFrame") -> "pd.DataFrame":
    """Join each filter's intervals, [iteration, end), that overlap or touch; the first names it."""
    order = ["layer_index", "filter", "iteration"]
    intervals = intervals.sort_values(order, kind="stable", ignore_index=True)
    same = [intervals[name] for name in order[:2]]
    reach = intervals["end"].groupby(same).cummax()
    apart = intervals["iteration"] > reach.groupby(same).shift(fill_value=-1)
    first = intervals[apart]
    return first.assign(end=intervals["end"].groupby(apart.cumsum()).max().to_numpy())


@dataclass(frozen=True)
class DeathCounts:
    """How often filters died: `deaths` is `revivals` plus `dead`, and `died` of them had at least
    one.
    """

    deaths: int
    died: int
    revivals: int
    dead: int


def count_deaths(deaths: "pd.DataFrame") -> DeathCounts:
    """Count a table of deaths: every one has ended in a revival, or its filter is dead at the end.

    `deaths`, `revivals` and `dead` count rows, `died` filters.
    """
    dead = int(deaths["revival_iteration"].isna().sum())
    died = len(deaths[_FILTER[1:]].drop_duplicates())
    return DeathCounts(len(deaths), died, len(deaths) - dead, dead)


def unknown_since(norms: NDArray[np.float32], iterations: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the stored iteration from which on each filter's norm is NaN, or −1 where it is not.

    norms: (R, F) at the stored `iterations`, (R,). 0 where it is NaN in all rows.
    """
    if not len(norms):
        return np.full(norms.shape[1], -1, dtype=np.int64)
    known = ~np.isnan(norms)
    after = len(norms) - known[::-1].argmax(axis=0)  # the row after the last that is known
    after[~known.any(axis=0)] = 0
    start = np.append(iterations, -1)[after]
    return np.where(after == 0, 0, start).astype(np.int64)


def decay_budget(
    lr: NDArray[np.float64], weight_decay: float, momentum: float, start: int = 0
) -> float:
    """Return Σ lr·wd/(1−μ) from iteration `start` on: a dead filter's norm falls by exp(−this).

    `lr` is the learning rate of every iteration, (T,). With momentum 1 the sum is infinite.
    """
    if momentum >= 1:
        return math.inf
    return float(np.nansum(lr[start:]) * weight_decay / (1 - momentum))


def predicted_crossing(
    lr: NDArray[np.float64],
    weight_decay: float,
    momentum: float,
    start: int,
    ratio: float = COLLAPSED_RATIO,
) -> int | None:
    """Return the iteration at which a filter dead since `start` falls under `ratio` of its norm.

    `lr` may be the schedule planned for the whole run. None when its decay budget does not reach
    ln(1/ratio).
    """
    if momentum >= 1:
        return start
    budget = np.nancumsum(lr[start:]) * weight_decay / (1 - momentum)
    crossed = np.flatnonzero(budget >= math.log(1 / ratio))
    return start + int(crossed[0]) if len(crossed) else None
