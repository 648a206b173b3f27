"""From blocks of measurements to the tables of a run directory.

Numbers the iterations, derives filter states and spells, and thins the norms to the stored rows
with their windows' extremes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgt_diag import storage, trace
from pgt_diag.filters import EVENT_KINDS, SpellTracker, death_window, filter_states

SCALARS = (
    "loss",
    "accuracy",
    "lr",
    "grad_norm",
    "grad_norm_before_clip",
    "clip_coefficient",
)
STORED_ROWS = 2048
"""Norms of so many iterations are stored, all of them, before they are thinned."""
_THINNED_ROWS = 1600
"""A thinned run keeps at most so many stored rows: its extremes make them three times as large."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """Measurements of T consecutive optimizer steps; F filters of all layers, G GAP features.

    All float32: `weight_norms`, `gradient_norms`, `clip_factors` and `activity` are (T, F), `gap`
    (T, G), `scalars` (T, len(SCALARS)). `skipped` (T,) bool marks steps that a GradScaler skipped.
    """

    weight_norms: Floats
    gradient_norms: Floats
    clip_factors: Floats
    activity: Floats
    gap: Floats
    scalars: Floats
    skipped: NDArray[np.bool_]

    def rows(self, chosen: NDArray[np.bool_]) -> "Block":
        """Return the block with only the chosen steps, (T,) bool."""
        if chosen.all():
            return self
        return Block(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class LayerSlices:
    """Where each layer's filters lie in a row: names, and offsets (L + 1,) into the F filters."""

    names: tuple[str, ...]
    offsets: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[str, slice]]:
        """Yield (name, slice) for each layer."""
        for index, name in enumerate(self.names):
            yield name, slice(self.offsets[index], self.offsets[index + 1])


def default_record_every(iterations: int) -> int:
    """Return how often to store norms in a run of so many iterations."""
    return 1 if iterations <= STORED_ROWS else math.ceil(iterations / _THINNED_ROWS)


def stored_mask(iterations: NDArray[np.int64], record_every: int | None) -> NDArray[np.bool_]:
    """Return which iterations' norms are stored: every `record_every`-th, from 0 on.

    With None, for a run of unknown length: every one of the first 2·STORED_ROWS, and then every
    k-th, with k doubling each time the run doubles.
    """
    step: NDArray[np.int64] | int = record_every or (
        2 ** np.floor(np.log2(np.maximum(iterations / STORED_ROWS, 1))).astype(np.int64)
    )
    stored: NDArray[np.bool_] = iterations % step == 0
    return stored


@dataclass
class _Windows:
    """Thins one quantity to stored rows, keeping each window's minimum and maximum."""

    low: Floats | None = None
    high: Floats | None = None
    rows: list[tuple[Floats, Floats, Floats]] = field(default_factory=list)
    """Stored rows so far: values, minima and maxima, each (rows, W)."""

    def add(self, values: Floats, ends: NDArray[np.int64]) -> None:
        """Take (T, W) values; `ends` are the positions of the stored rows among them."""
        if len(ends) == len(values) and self.low is None:
            self.rows.append((values, values, values))
            return
        start = 0
        for end in ends:
            self._extend(values[start : end + 1])
            self.store(values[end])
            start = end + 1
        if start < len(values):
            self._extend(values[start:])

    def store(self, values: Floats) -> None:
        """End the window with a stored row, (W,)."""
        assert self.low is not None and self.high is not None
        self.rows.append((values[None], self.low[None], self.high[None]))
        self.low = self.high = None

    def _extend(self, values: Floats) -> None:
        low, high = _extreme(np.minimum, np.fmin, values), _extreme(np.maximum, np.fmax, values)
        self.low = low if self.low is None else np.fmin(self.low, low)
        self.high = high if self.high is None else np.fmax(self.high, high)

    def take(self) -> tuple[Floats, Floats, Floats]:
        """Return the stored rows so far, and forget them."""
        rows, self.rows = self.rows, []
        value, low, high = (np.concatenate(part) for part in zip(*rows, strict=True))
        return value, low, high


def _extreme(fast: np.ufunc, ignoring_nan: np.ufunc, values: Floats) -> Floats:
    """Return the extremes over (T, W) that ignore NaN; the ufunc that does so is the slower."""
    found: Floats = fast.reduce(values)
    unknown = np.isnan(found)
    if unknown.any() and not np.isnan(values[0]).all():
        found[unknown] = ignoring_nan.reduce(values[:, unknown])
    return found


class TraceEncoder:
    """Turns blocks into the tables of a run directory. Not thread-safe: one owner."""

    def __init__(
        self,
        directory: Path,
        layers: LayerSlices,
        initial_norms: Floats,
        *,
        record_every: int | None = None,
        min_spell: int = 1,
        ratios: tuple[float, float],
        stop_when_diverged: bool = False,
        planned_iterations: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.layers = layers
        self.iterations = 0
        self.dead_filters = 0
        self.latest = (math.nan, math.nan)
        self.diverged_at: int | None = None
        self._stop_when_diverged = stop_when_diverged
        self._planned_iterations = planned_iterations
        self._initial_norms = initial_norms
        self._record_every = record_every
        self._ratios = ratios
        self._layer_of = np.repeat(np.arange(len(layers.names)), np.diff(layers.offsets))
        self._spells = SpellTracker(layers.offsets[-1], min_spell)
        self._norms = trace.PartWriter(directory / trace.NORMS_FOLDER)
        self._steps = trace.PartWriter(directory / trace.ITERATIONS_FOLDER)
        self._events = trace.PartWriter(directory / trace.EVENTS_FOLDER)
        self._brief_folder = directory / trace.BRIEF_SPELLS_FOLDER
        storage.make_folder(self._brief_folder)
        self._brief_written = 0
        self._event_count = 0
        self._windows: dict[str, _Windows] = {}
        self._stored: list[int] = []
        self._stored_count = 0
        self._last_stored = -1
        self._last: dict[str, Floats] = {}
        self._step_columns: list[dict[str, NDArray[Any]]] = []
        self._event_rows: list[NDArray[np.int64]] = []
        if state is not None:
            self._load(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes on from here, after `flush`: arrays, numbers and text."""
        loss, accuracy = self.latest
        return {
            "iterations": self.iterations,
            "event_count": self._event_count,
            "stored_count": self._stored_count,
            "last_stored": self._last_stored,
            "latest": [loss, accuracy],
            "initial_norms": self._initial_norms,
            "spells": self._spells.state_dict(),
            "last": dict(self._last),
            "windows": {
                name: [window.low, window.high]
                for name, window in self._windows.items()
                if window.low is not None
            },
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.iterations = int(state["iterations"])
        self._event_count = int(state["event_count"])
        self._stored_count = int(state["stored_count"])
        self._last_stored = int(state["last_stored"])
        loss, accuracy = state["latest"]
        self.latest = (float(loss), float(accuracy))
        self._initial_norms = np.array(state["initial_norms"], dtype=np.float32)
        filters = (self.layers.offsets[-1],)
        if self._initial_norms.shape != filters:
            raise ValueError(f"not of {filters[0]} filters")
        self._spells.load_state_dict(state["spells"])
        self._count_dead()
        self._last = {name: np.array(values) for name, values in state["last"].items()}
        self._windows = {name: _Windows() for name in self._last}
        for name, (low, high) in state["windows"].items():
            self._windows[name] = _Windows(np.array(low), np.array(high))

    @property
    def gap_features(self) -> int | None:
        """How many GAP features an iteration has, if there was one."""
        return len(self._last["gap_norm"]) if self._last else None

    def add(self, block: Block) -> None:
        """Take the next block."""
        if self._stop_when_diverged:
            block = self._before_divergence(block)
        block = block.rows(~block.skipped)
        length = len(block.skipped)
        if length == 0:
            return
        numbers = np.arange(self.iterations, self.iterations + length)
        states = filter_states(
            block.activity,
            block.gradient_norms,
            block.weight_norms,
            self._initial_norms,
            *self._ratios,
            before=self._spells.holding,
        )
        self._event_rows.append(self._spells.update(states))
        self._add_steps(block, states, numbers)
        self._add_norms(block, numbers)
        self.iterations += length
        self._count_dead()
        self.latest = (float(block.scalars[-1, 0]), float(block.scalars[-1, 1]))

    def flush(self) -> None:
        """Write everything taken so far to part files."""
        if self._stored:
            self._norms.write(self._norm_table(), self._stored[0], self._stored[-1])
            self._stored_count += len(self._stored)
            self._last_stored = self._stored[-1]
            self._stored = []
        if self._step_columns:
            columns = {
                name: np.concatenate([block[name] for block in self._step_columns])
                for name in self._step_columns[0]
            }
            self._step_columns = []
            table = pa.table({name: trace.column(values) for name, values in columns.items()})
            numbers = columns["iteration"]
            self._steps.write(table, int(numbers[0]), int(numbers[-1]))
        rows = np.concatenate([np.empty((0, 4), dtype=np.int64), *self._event_rows])
        self._event_rows = []
        if len(rows):
            last_event = self._event_count + len(rows) - 1
            self._events.write(self._event_table(rows), self._event_count, last_event)
            self._event_count += len(rows)
        if (brief := int(self._spells.brief.sum())) != self._brief_written:
            self._brief_written = brief
            self._write_brief_spells()

    def seal(self, *, complete: bool) -> dict[str, bytes]:
        """Flush and merge the small parts; return the event log and the brief spells as files.

        A `complete` run is never resumed: its last iteration's norms are stored too.
        """
        if complete and self.iterations - 1 not in (self._last_stored, *self._stored[-1:]):
            self._store_last()
        self.flush()
        for writer in (self._norms, self._steps, self._events):
            writer.merge()
        events = resolve_events(trace.read_parts(self._events.folder))
        return {
            trace.EVENTS_FILE: trace.encode_table(events),
            trace.BRIEF_SPELLS_FILE: trace.encode_table(self._brief_table()),
        }

    def _before_divergence(self, block: Block) -> Block:
        """Drop the first step whose loss is not finite, and whatever follows it."""
        if self.diverged_at is None:
            bad = ~np.isfinite(block.scalars[:, SCALARS.index("loss")])
            if not bad.any():
                return block
            first = int(bad.argmax())
            self.diverged_at = self.iterations + int((~block.skipped[:first]).sum())
        else:
            first = 0
        return block.rows(np.arange(len(block.skipped)) < first)

    def _count_dead(self) -> None:
        """Count the filters that a report would call dead, if the run ended here."""
        iterations = self._planned_iterations or self.iterations
        window = death_window(iterations, self._spells.min_spell)
        self.dead_filters = self._spells.dead_filters(window)

    def _add_steps(
        self, block: Block, states: NDArray[np.bool_], numbers: NDArray[np.int64]
    ) -> None:
        starts = np.asarray(self.layers.offsets[:-1])
        columns: dict[str, NDArray[Any]] = {"iteration": numbers}
        columns |= {name: block.scalars[:, i] for i, name in enumerate(SCALARS)}
        for kind, state in zip(EVENT_KINDS, states, strict=True):
            columns[f"{kind}_filters"] = self._count_by_layer(state)
        columns["clipped_filters"] = self._count_by_layer(block.clip_factors < 1)
        if np.isnan(block.clip_factors[0]).all() and np.isnan(block.clip_factors[-1]).all():
            mean = np.full((len(numbers), len(starts)), np.nan, dtype=np.float32)
        else:
            sums = np.add.reduceat(block.clip_factors, starts, axis=1)
            mean = (sums / np.diff(self.layers.offsets)).astype(np.float32)
        columns["mean_clip_factor"] = mean
        self._step_columns.append(columns)

    def _count_by_layer(self, state: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Count, from (T, F), in how many of each layer's filters it holds, (T, L)."""
        time, index = np.divmod(np.flatnonzero(state), state.shape[1])
        shape = (len(state), len(self.layers.names))
        cells = np.ravel_multi_index((time, self._layer_of[index]), shape)
        counts = np.bincount(cells, minlength=math.prod(shape)).reshape(shape)
        return counts.astype(np.int32)

    def _add_norms(self, block: Block, numbers: NDArray[np.int64]) -> None:
        quantities = {
            "weight_norm": block.weight_norms,
            "gradient_norm": block.gradient_norms,
            "clip_factor": block.clip_factors,
            "gap_norm": block.gap,
        }
        ends = np.flatnonzero(stored_mask(numbers, self._record_every))
        for name, values in quantities.items():
            self._windows.setdefault(name, _Windows()).add(values, ends)
            self._last[name] = values[-1]
        self._stored.extend(int(number) for number in numbers[ends])

    def _store_last(self) -> None:
        for name, values in self._last.items():
            self._windows[name].store(values)
        self._stored.append(self.iterations - 1)

    def _norm_table(self) -> pa.Table:
        columns = {"iteration": trace.column(np.asarray(self._stored, dtype=np.int64))}
        for name, window in self._windows.items():
            value, low, high = window.take()
            if np.isnan(value[0]).all() and np.isnan(value).all():
                continue
            thinned = low is not high and not np.array_equal(low, high, equal_nan=True)
            statistics = {"": value, "_min": low, "_max": high} if thinned else {"": value}
            whole = [(None, slice(None))]
            for layer, part in whole if name == "gap_norm" else self.layers:
                for suffix, rows in statistics.items():
                    label = trace.column_name(name + suffix, layer)
                    columns[label] = trace.column(rows[:, part])
        return pa.table(columns)

    def _event_table(self, rows: NDArray[np.int64]) -> pa.Table:
        kind, flat, start, end = rows.T
        layer = self._layer_of[flat]
        first = np.asarray(self.layers.offsets)[layer]
        ended = pa.py_buffer(np.packbits(end >= 0, bitorder="little"))
        ends = np.ascontiguousarray(end)
        columns = [
            trace.text_column(EVENT_KINDS, kind),
            trace.text_column(self.layers.names, layer),
            trace.column(layer.astype(np.int32)),
            trace.column((flat - first).astype(np.int32)),
            trace.column(start),
            pa.Array.from_buffers(pa.int64(), len(ends), [ended, pa.py_buffer(ends)]),
        ]
        return pa.table(columns, schema=trace.EVENT_SCHEMA)

    def _brief_table(self) -> pa.Table:
        kind, flat = np.nonzero(self._spells.brief)
        rows = np.stack((kind, flat, np.zeros_like(kind), np.zeros_like(kind)), axis=1)
        table = self._event_table(rows).drop_columns(["start_iteration", "end_iteration"])
        return table.append_column("spells", trace.column(self._spells.brief[kind, flat]))

    def _write_brief_spells(self) -> None:
        """Write the counts up to now; the wider part takes the place of the one before."""
        older = trace.all_parts(self._brief_folder)
        newest = trace.write_part(self._brief_folder, self._brief_table(), 0, self.iterations - 1)
        for part in older:
            if part.path != newest.path:
                storage.remove(part.path)


def resolve_events(parts: Sequence[pa.Table]) -> pa.Table:
    """Return the event log in which a spell that was logged open and then ended appears once.

    Ordered by start, layer, filter and kind.
    """
    if not parts:
        return trace.EVENT_SCHEMA.empty_table()
    log = pa.concat_tables(parts)
    key = ["start_iteration", "layer_index", "filter", "kind"]
    order = ["layer", "end_iteration"]
    # An open row has no end, so the largest end of a spell's rows is the one that is known last.
    grouped = log.group_by(key, use_threads=False).aggregate([(name, "max") for name in order])
    grouped = grouped.rename_columns(
        [name.removesuffix("_max") for name in grouped.column_names]
    ).sort_by([(name, "ascending") for name in key])
    return grouped.select(trace.EVENT_SCHEMA.names).cast(trace.EVENT_SCHEMA)


def layer_slices(names: Sequence[str], filters: Sequence[int]) -> LayerSlices:
    """Return the slices of layers with these numbers of filters, one after the other."""
    offsets = np.concatenate(([0], np.cumsum(filters)))
    return LayerSlices(tuple(names), tuple(int(offset) for offset in offsets))
