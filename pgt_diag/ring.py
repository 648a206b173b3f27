"""The row that the hooks write to, and the ring on the device that keeps the finished ones.

The row is always the same memory, so that a step captured as a CUDA graph can write to it. The ring
has two halves: while one fills, the other is copied beside the training stream.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgt_diag.encoder import SCALARS, Block
from pgt_diag.reductions import working_kernels

HALF = 32
"""Rows in half a ring."""


@dataclass(frozen=True)
class RowLayout:
    """Where each measurement lies in a ring row of `width` float32 values."""

    weight_norms: slice
    gradient_norms: slice
    clip_factors: slice
    activity: slice
    gap: slice
    scalars: slice
    skipped: slice

    @property
    def width(self) -> int:
        """How many values a row has."""
        return int(self.skipped.stop)

    @classmethod
    def of(cls, filters: int, gap: int) -> "RowLayout":
        """Lay out a row for this many filters and GAP features."""
        widths = (filters, filters, filters, filters, gap, len(SCALARS), 1)
        edges = [0, *np.cumsum(widths).tolist()]
        parts = [slice(start, end) for start, end in itertools.pairwise(edges)]
        return cls(*parts)

    def block(self, rows: Tensor) -> Block:
        """Return CPU ring rows (T, width) as a block."""
        values = rows.numpy()
        return Block(
            weight_norms=values[:, self.weight_norms],
            gradient_norms=values[:, self.gradient_norms],
            clip_factors=values[:, self.clip_factors],
            activity=values[:, self.activity],
            gap=np.sqrt(values[:, self.gap]),
            scalars=values[:, self.scalars],
            skipped=values[:, self.skipped][:, 0] != 0,
        )


class Row:
    """The coming step's row, (width,) float32, and views of its parts: slicing takes time."""

    def __init__(self, values: Tensor, layout: RowLayout, layers: Sequence[slice]) -> None:
        self.values = values
        self.weight_norms = values[layout.weight_norms]
        self.gradient_norms = values[layout.gradient_norms]
        self.clip_factors = values[layout.clip_factors]
        self.activity = values[layout.activity]
        self.gap = values[layout.gap]
        self.shared = values[layout.activity.start : layout.gap.stop]
        """What adds up over processes that share a batch: activity and GAP features."""
        self.scalars = dict(zip(SCALARS, values[layout.scalars].unbind(), strict=True))
        self.skipped = values[layout.skipped]
        self.weight_norms_of = [self.weight_norms[part] for part in layers]
        self.gradient_norms_of = [self.gradient_norms[part] for part in layers]
        self.clip_factors_of = [self.clip_factors[part] for part in layers]
        self.activity_of = [self.activity[part] for part in layers]


class Ring:
    """Rows of float32 measurements on the training device.

    A fresh row is NaN (unknown) but for what adds up over an iteration's batches: activity, and
    the squares of the GAP features. `layers` are the layers' filters; those whose activity is never
    seen, `unseen` by index, stay unknown.
    """

    def __init__(
        self,
        layout: RowLayout,
        device: torch.device,
        layers: Sequence[slice],
        unseen: Sequence[int],
    ) -> None:
        self.layout = layout
        blank = torch.full((layout.width,), torch.nan, dtype=torch.float32, device=device)
        for part in (layout.activity, layout.gap, layout.skipped):
            blank[part] = 0
        for index in unseen:
            blank[layout.activity][layers[index]] = torch.nan
        self._blank = blank
        self.row = Row(blank.clone(), layout, layers)
        self._halves = blank.new_empty(2, HALF, layout.width)
        self._transfer = _Transfer(self._halves) if self._halves.is_cuda else None
        self._kernels = working_kernels(device)
        self._half = 0
        self._finished = 0

    def clear(self) -> None:
        """Make the row of the coming step blank again."""
        self.row.values.copy_(self._blank)

    def advance(self) -> bool:
        """Keep the row and blank it; return whether the half is full and has to be taken."""
        kept = self._halves[self._half, self._finished]
        if self._kernels is not None:
            self._kernels.keep_row(self.row.values, self._blank, kept)
        else:
            kept.copy_(self.row.values)
            self.clear()
        self._finished += 1
        return self._finished == HALF

    def take(self) -> Callable[[], Block] | None:
        """Go on in the other half; return a function that waits for the finished rows' copy.

        None when no row is finished.
        """
        if self._finished == 0:
            return None
        rows = self._halves[self._half, : self._finished]
        copied = self._transfer.start(rows) if self._transfer else _copy(rows)
        self._half, self._finished = 1 - self._half, 0
        return lambda: self.layout.block(copied())


def _copy(rows: Tensor) -> Callable[[], Tensor]:
    copy = rows.clone()
    return lambda: copy


class _Transfer:
    """Copies ring rows to pinned memory beside the training stream."""

    _BUFFERS = 4  # one in the copy, two in the writer's queue, one being encoded

    def __init__(self, ring: Tensor) -> None:
        shape = (self._BUFFERS, *ring.shape[1:])
        self._pinned = torch.empty(shape, pin_memory=True)
        self._stream = torch.cuda.Stream(ring.device)  # type: ignore[no-untyped-call]
        self._count = 0
        self._copied: torch.cuda.Event | None = None

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """Start a copy; return a function that waits for it, in another thread, and returns it."""
        training = torch.cuda.current_stream(rows.device)
        if self._copied is not None:
            # The half that training goes on in is the one that the last copy read.
            training.wait_event(self._copied)
        buffer = self._pinned[self._count % self._BUFFERS][: len(rows)]
        self._count += 1
        # The thread that waits is to leave its core to others.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            buffer.copy_(rows, non_blocking=True)
            copied.record(self._stream)
        self._copied = copied

        def wait() -> Tensor:
            copied.synchronize()
            return buffer.clone()

        return wait
