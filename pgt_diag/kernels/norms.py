"""The norms of filters, and the row of measurements that they are kept in."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_WEIGHTS = 64
"""In one launch: each of them is an argument of the kernel."""
_BLOCK, _WARPS = 1024, 4
_TOGETHER = 2
"""Filters of one program: finding its weight takes as long as reading a few hundred numbers."""


@triton.jit
def _find(group, rows, outs, firsts, lengths, fans, start: tl.constexpr, end: tl.constexpr):
    """Return the weight, from `start` to `end`, that program `group` has filters of."""
    row, out = rows[start], outs[start]
    first, length, fan = firsts[start], lengths[start], fans[start]
    for i in tl.static_range(start + 1, end):
        here = group >= firsts[i]
        row = tl.where(here, rows[i], row)
        out = tl.where(here, outs[i], out)
        first = tl.where(here, firsts[i], first)
        length = tl.where(here, lengths[i], length)
        fan = tl.where(here, fans[i], fan)
    return row, out, first, length, fan


@triton.jit
def root_of(total):
    """Return the root of a float64 sum of squares as float32; what is finite stays finite."""
    root = tl.sqrt(total)
    # A NaN and an infinity fail the comparison.
    largest: tl.constexpr = 3.4028234663852886e38
    return tl.where(root < float("inf"), tl.minimum(root, largest), root).to(tl.float32)


@triton.jit
def _write_norms(row, out, number, length, fan, together: tl.constexpr, block: tl.constexpr):
    """Write the L2 norms of filters `number` of a weight, in float64 until they are rounded."""
    number += tl.arange(0, together)
    inside = number < length
    begin = row + number.to(tl.int64)[:, None] * fan
    total = tl.zeros((together, block), tl.float64)
    for start in range(0, fan, block):
        column = (start + tl.arange(0, block))[None, :]
        mask = inside[:, None] & (column < fan)
        values = tl.load(begin + column, mask=mask, other=0.0).to(tl.float64)
        total += values * values
    tl.store(out + number, root_of(tl.sum(total, 1)), mask=inside)


@triton.jit
def norms_kernel(
    rows,
    outs,
    firsts,
    lengths,
    fans,
    aligned: tl.constexpr,
    count: tl.constexpr,
    together: tl.constexpr,
    block: tl.constexpr,
):
    """Write the L2 norms of all filters of `count` weights.

    rows: pointers to the weights; outs: to where their norms go; firsts: each weight's first
    program, and the number of programs; lengths: how many filters a weight has; fans: how many
    numbers a filter has. The first `aligned` weights can be read 16 bytes at a time: where a
    single one cannot, the compiler would not read any so.
    """
    group = tl.program_id(0)
    if group < firsts[aligned]:
        row, out, first, length, fan = _find(group, rows, outs, firsts, lengths, fans, 0, aligned)
        _write_norms(row, out, (group - first) * together, length, fan, together, block)
    else:
        row, out, first, length, fan = _find(
            group, rows, outs, firsts, lengths, fans, min(aligned, count - 1), count
        )
        _write_norms(row, out, (group - first) * together, length, fan, together, block)


@triton.jit(do_not_specialize=["count", "other_count"])
def total_kernel(norms, count, others, other_count, out, block: tl.constexpr):
    """Write the L2 norm of all numbers of two vectors."""
    total = tl.zeros((block,), tl.float64)
    for start in range(0, count, block):
        place = start + tl.arange(0, block)
        values = tl.load(norms + place, mask=place < count, other=0.0).to(tl.float64)
        total += values * values
    for start in range(0, other_count, block):
        place = start + tl.arange(0, block)
        values = tl.load(others + place, mask=place < other_count, other=0.0).to(tl.float64)
        total += values * values
    tl.store(out, root_of(tl.sum(total, 0)))


@triton.jit(do_not_specialize=["width"])
def keep_kernel(row, blank, kept, width, block: tl.constexpr):
    """Copy a row to `kept`, and what is blank to the row."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(row + place, mask=place < width)
    tl.store(kept + place, values, mask=place < width)
    tl.store(row + place, tl.load(blank + place, mask=place < width), mask=place < width)


def write_filter_norms(weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Write every filter's L2 norm; what `reductions.filter_norms` does.

    weights: (filters, ...) each, of one dtype, each filter dense in memory (see `is_dense`); outs:
    (filters,) float32 each, contiguous; all on one GPU.
    """
    pairs = list(zip(weights, outs, strict=True))
    for start in range(0, len(pairs), _MOST_WEIGHTS):
        some = pairs[start : start + _MOST_WEIGHTS]
        wide = [pair for pair in some if is_aligned(pair[0])]
        some = [*wide, *(pair for pair in some if not is_aligned(pair[0]))]
        firsts = [0]
        for weight, _ in some:
            firsts.append(firsts[-1] + triton.cdiv(len(weight), _TOGETHER))
        with torch.cuda.device_of(some[0][0]):  # type: ignore[no-untyped-call]
            norms_kernel[(firsts[-1],)](
                tuple(weight for weight, _ in some),
                tuple(out for _, out in some),
                tuple(firsts),
                tuple(len(weight) for weight, _ in some),
                tuple(weight.numel() // len(weight) for weight, _ in some),
                aligned=len(wide),
                count=len(some),
                together=_TOGETHER,
                block=_BLOCK,
                num_warps=_WARPS,
            )


def is_aligned(weight: Tensor) -> bool:
    """Whether each filter can be read 16 bytes at a time, as far as Triton finds out."""
    # Of its arguments it finds out whether they are multiples of 16.
    return weight.data_ptr() % 16 == 0 and (weight.numel() // len(weight)) % 16 == 0


def is_dense(weight: Tensor) -> bool:
    """Whether each filter's numbers lie side by side, and the filters one after the other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(weight.dim())
    return weight.numel() > 0 and (
        weight.is_contiguous() or (last is not None and weight.is_contiguous(memory_format=last))
    )


def write_total(norms: Tensor, others: Tensor, out: Tensor) -> None:
    """Write the L2 norm of all numbers of two contiguous float32 vectors into out, ()."""
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        total_kernel[(1,)](norms, len(norms), others, len(others), out, block=2048, num_warps=8)


def keep_row(row: Tensor, blank: Tensor, kept: Tensor) -> None:
    """Copy a row to `kept`, and what is blank to the row: (width,) float32 each, contiguous."""
    with torch.cuda.device_of(row):  # type: ignore[no-untyped-call]
        keep_kernel[(triton.cdiv(len(row), _BLOCK),)](row, blank, kept, len(row), block=_BLOCK)
