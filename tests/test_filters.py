"""Spells, deaths, revivals and the decay budget, against plain loops."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgt_diag.filters import (
    EVENT_KINDS,
    SpellTracker,
    count_deaths,
    death_window,
    deaths,
    decay_budget,
    filter_states,
    predicted_crossing,
    unknown_since,
)


def spells_by_loop(
    states: np.ndarray, min_spell: int
) -> tuple[dict[tuple[int, int, int], int], np.ndarray]:
    kinds, length, filters = states.shape
    spells, brief = {}, np.zeros((kinds, filters), dtype=int)
    for kind in range(kinds):
        for index in range(filters):
            start = None
            for iteration in range(length + 1):
                holds = iteration < length and states[kind, iteration, index]
                if holds and start is None:
                    start = iteration
                if not holds and start is not None:
                    if iteration - start >= min_spell:
                        spells[kind, index, start] = iteration if iteration < length else -1
                    elif iteration < length:
                        brief[kind, index] += 1
                    start = None
    return spells, brief


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(0, 40),
    density=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_spell=st.integers(1, 5),
)
def test_spells_are_those_of_a_plain_loop_however_the_run_is_cut_into_blocks(
    seed: int, length: int, density: float, min_spell: int
) -> None:
    generator = np.random.default_rng(seed)
    states = generator.random((len(EVENT_KINDS), length, 4)) < density
    tracker = SpellTracker(4, min_spell)
    found: dict[tuple[int, int, int], int] = {}
    position = 0
    while position < length:
        block = int(generator.integers(0, 9))
        for kind, index, start, end in tracker.update(states[:, position : position + block]):
            key = (int(kind), int(index), int(start))
            assert found.get(key, -1) == -1, "a spell that had ended was reported again"
            assert key not in found or end != -1, "a lasting spell was reported twice"
            found[key] = int(end)
        position += block
    expected, brief = spells_by_loop(states, min_spell)
    assert found == expected
    np.testing.assert_array_equal(tracker.brief, brief)


def test_states_compare_with_the_start_and_unknown_is_no_state() -> None:
    initial = np.array([1.0, 2.0, 0.0, 1e-20], dtype=np.float32)
    weight = np.array([[9e-3, 2.1e-3, 0.0, 1e-23]], dtype=np.float32)
    activity = np.array([[0, 1e-40, np.nan, 3]], dtype=np.float32)
    gradient = np.array([[0, np.nan, 1e-44, 0]], dtype=np.float32)
    states = filter_states(activity, gradient, weight, initial)[:, 0].tolist()
    assert dict(zip(EVENT_KINDS, states, strict=True)) == {
        "silent": [True, False, False, False],
        "zero_gradient": [True, False, False, True],
        "collapsed": [True, True, False, True],
        "zeroed": [False, False, False, False],
    }


def log(*rows: tuple[str, int, int, int | None]) -> pd.DataFrame:
    frame = pd.DataFrame(
        rows, columns=["kind", "filter", "start_iteration", "end_iteration"]
    ).assign(layer="conv1", layer_index=0)
    frame["end_iteration"] = pd.array(frame["end_iteration"].tolist(), dtype="Int64")
    return frame


def died(events: pd.DataFrame, count: int, window: int) -> list[list[object]]:
    found = deaths(events, count, window)
    columns = found[["filter", "iteration", "revival_iteration", "cause"]].astype(object)
    return columns.where(columns.notna(), None).to_numpy().tolist()


def test_a_filter_is_dead_while_it_is_silent_and_gets_no_gradient_at_once() -> None:
    events = log(
        ("silent", 1, 10, 60),
        ("zero_gradient", 1, 20, 70),
        ("silent", 2, 30, None),
        ("zero_gradient", 2, 35, None),
        ("silent", 3, 5, None),
        ("zero_gradient", 4, 5, None),
    )
    assert died(events, 100, 10) == [[1, 20, 60, "silent"], [2, 35, None, "silent"]]


def test_what_is_shorter_than_the_window_is_no_death_even_at_the_end_of_the_run() -> None:
    events = log(
        ("silent", 1, 10, 19),
        ("zero_gradient", 1, 10, 19),
        ("silent", 2, 92, None),
        ("zero_gradient", 2, 92, None),
        ("silent", 3, 0, 30),
        ("zero_gradient", 3, 25, 60),
    )
    assert died(events, 100, 10) == []
    assert died(events, 100, 8) == [[1, 10, 19, "silent"], [2, 92, None, "silent"]]


def test_each_death_of_a_filter_that_comes_back_is_told() -> None:
    events = log(
        ("silent", 1, 0, 20),
        ("silent", 1, 40, None),
        ("zero_gradient", 1, 0, 20),
        ("zero_gradient", 1, 40, None),
    )
    assert died(events, 100, 10) == [[1, 0, 20, "silent"], [1, 40, None, "silent"]]


def test_a_collapse_with_a_gradient_is_a_cause_of_its_own_and_is_not_counted_twice() -> None:
    events = log(
        ("collapsed", 1, 50, None),
        ("silent", 2, 10, None),
        ("zero_gradient", 2, 10, None),
        ("collapsed", 2, 60, None),
    )
    assert died(events, 100, 10) == [[2, 10, None, "silent"], [1, 50, None, "collapsed"]]


def test_a_silence_that_turns_into_a_collapse_is_one_death_that_lasts() -> None:
    events = log(
        ("silent", 1, 100, 200),
        ("zero_gradient", 1, 100, 200),
        ("collapsed", 1, 150, None),
        # One after the other without a gap, and with one of a single iteration.
        ("silent", 2, 100, 200),
        ("zero_gradient", 2, 100, 200),
        ("collapsed", 2, 200, None),
        ("silent", 3, 100, 200),
        ("zero_gradient", 3, 100, 200),
        ("collapsed", 3, 201, None),
        # A collapse that a later silence lies within began the death.
        ("collapsed", 4, 50, 400),
        ("silent", 4, 80, 120),
        ("zero_gradient", 4, 80, 120),
    )
    assert died(events, 500, 10) == [
        [4, 50, 400, "collapsed"],
        [1, 100, None, "silent"],
        [2, 100, None, "silent"],
        [3, 100, 200, "silent"],
        [3, 201, None, "collapsed"],
    ]


def dead_by_loop(states: np.ndarray, window: int) -> np.ndarray:
    """Return (T, F): whether a filter is dead, by the definition as a sentence has it."""
    silent, zero_gradient, collapsed, _ = states
    dead = np.zeros(silent.shape, dtype=bool)
    for holds in (silent & zero_gradient, collapsed):
        for index in range(holds.shape[1]):
            start = 0
            for iteration in range(len(holds) + 1):
                if iteration == len(holds) or not holds[iteration, index]:
                    dead[start:iteration, index] |= iteration - start >= window
                    start = iteration + 1
    return dead


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 60),
    density=st.sampled_from([0.3, 0.8, 0.95]),
    window=st.integers(1, 6),
    min_spell=st.integers(1, 8),
)
def test_the_log_and_the_live_count_agree_with_a_plain_loop_on_who_is_dead_and_when(
    seed: int, length: int, density: float, window: int, min_spell: int
) -> None:
    window = max(window, min_spell)
    states = np.random.default_rng(seed).random((len(EVENT_KINDS), length, 4)) < density
    tracker = SpellTracker(4, min_spell)
    spells: dict[tuple[str, int, int], int | None] = {}
    for kind, index, start, end in tracker.update(states):
        spells[EVENT_KINDS[kind], int(index), int(start)] = int(end) if end >= 0 else None
    table = deaths(log(*((*key, end) for key, end in spells.items())), length, window)
    dead = np.zeros(states.shape[1:], dtype=int)
    for row in table.itertuples():
        end = length if pd.isna(row.revival_iteration) else int(row.revival_iteration)
        dead[int(row.iteration) : end, int(row.filter)] += 1
    expected = dead_by_loop(states, window)
    np.testing.assert_array_equal(dead, expected)  # once each: deaths are disjoint
    counts = count_deaths(table)
    assert counts.deaths == counts.revivals + counts.dead
    assert counts.died == expected.any(axis=0).sum()
    assert counts.dead == expected[-1].sum() == tracker.dead_filters(window)


def test_the_window_is_a_hundredth_of_the_run_and_never_shorter_than_what_the_log_has() -> None:
    assert [death_window(count) for count in (0, 900, 1100, 36_000)] == [10, 10, 11, 360]
    assert death_window(900, min_spell=25) == 25


def test_what_is_not_seen_for_a_while_goes_on_as_it_was() -> None:
    nan = np.nan
    activity = np.array([[0, 3, nan], [nan, nan, nan], [nan, nan, nan], [0, 3, 0]], np.float32)
    gradient = np.ones_like(activity)
    ones = np.ones_like(activity)
    states = filter_states(activity, gradient, ones, ones[0])
    assert states[0].tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [True, False, True],
    ]
    before = np.zeros((4, 3), dtype=bool)
    before[0] = [False, True, True]
    carried = filter_states(activity[1:], gradient[1:], ones[1:], ones[0], before=before)
    assert carried[0].tolist() == [[False, True, True], [False, True, True], [True, False, True]]


def test_unknown_to_the_end_is_from_the_first_stored_row_that_nothing_follows() -> None:
    nan = np.nan
    norms = np.array([[1, nan, nan, nan], [nan, 1, nan, 1], [1, nan, nan, nan]], np.float32)
    rows = np.array([0, 10, 20])
    assert unknown_since(norms, rows).tolist() == [-1, 20, 0, 20]
    assert unknown_since(norms[:0], rows[:0]).tolist() == [-1] * 4


def test_no_events_are_no_deaths() -> None:
    assert died(log(), 100, 10) == []


def test_a_dead_filter_shrinks_by_the_decay_budget() -> None:
    # torch's SGD on a filter without gradient, the case the budget describes.
    import torch

    lr, weight_decay, momentum, steps = 0.1, 5e-4, 0.9, 10_500
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=lr, weight_decay=weight_decay, momentum=momentum)
    norms = []
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        norms.append(weight.item())
    rates = np.full(steps, lr)
    # Momentum needs its first 1/(1−μ) iterations to come to speed; then the rates agree.
    measured = math.log(norms[99] / norms[-1])
    assert measured == pytest.approx(decay_budget(rates, weight_decay, momentum, 100), rel=0.01)
    crossed = next(i for i, norm in enumerate(norms) if norm < 1e-2)
    predicted = predicted_crossing(rates, weight_decay, momentum, 0)
    assert predicted == pytest.approx(crossed, rel=0.01)
    assert predicted_crossing(rates[: steps // 2], weight_decay, momentum, 0) is None
