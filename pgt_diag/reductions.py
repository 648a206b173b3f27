"""What the hooks compute, as pure tensor maths: filter norms, silence, spatial means."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAFE_NORM = 1e-15
"""Squares of float32 numbers below this lose digits or underflow to 0; the norm is taken again."""

# With fewer pixels to a map, the CPU adds up faster over the batch first.
_FEW_PIXELS = 16
# In smaller maps all images are read faster than few are found to be enough.
_LARGE, _FEW_IMAGES = 1 << 20, 8

Reading = Literal["sum", "peak", "positive"]
"""How a hook reads a map: "sum" of a non-negative one, "peak" |value| of a signed one, or the
"positive" part of what a ReLU without a module of its own is about to take."""


def is_asynchronous(tensor: Tensor) -> bool:
    """Whether what is done with it is only started: its values must not decide what comes next."""
    return tensor.is_cuda


def rows_of(parameter: Tensor) -> Tensor:
    """Return a parameter, or a gradient, with a row for each of its filters: a vector is one."""
    return parameter if parameter.dim() > 1 else parameter.reshape(1, -1)


def filter_norms(weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Write the L2 norm of every filter of each weight into its `out`, whatever its size.

    weights: (filters, ...) each, of any float dtype, on one device; out: (filters,) each, float32
    or the weight's dtype. Only a filter of zeros has the norm 0, and only one with an infinity an
    infinite norm: what its `out` cannot hold is the least, or the largest, number that it can.
    """
    if not weights:
        return
    if is_asynchronous(weights[0]):
        _start_filter_norms(weights, out)
        return
    for weight, norms in zip(weights, out, strict=True):
        dims = tuple(range(1, weight.dim()))
        if weight.dtype == norms.dtype:
            torch.linalg.vector_norm(weight, dim=dims, out=norms)
        else:
            dtype = torch.promote_types(weight.dtype, norms.dtype)
            norms.copy_(torch.linalg.vector_norm(weight, dim=dims, dtype=dtype))
    # Once for all: of an operation on a few hundred numbers its start takes the most time.
    if len(_odd(torch.cat(list(out)).numpy())):
        for weight, norms in zip(weights, out, strict=True):
            take_norms_again(weight, norms)


def _start_filter_norms(weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    kernels = working_kernels(weights[0].device)
    pairs = list(zip(weights, out, strict=True))
    fits = [
        kernels is not None
        and weight.dtype == weights[0].dtype
        and norms.dtype == torch.float32
        and kernels.is_dense(weight)
        for weight, norms in pairs
    ]
    if kernels is not None and any(fits):
        some = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
        kernels.write_filter_norms(*zip(*some, strict=True))
    for (weight, norms), fit in zip(pairs, fits, strict=True):
        if not fit:
            # float64 in registers: no waiting for the device to see which filters are small.
            dims = tuple(range(1, weight.dim()))
            norms.copy_(torch.linalg.vector_norm(weight, dim=dims, dtype=torch.float64))


def write_total_norm(norms: Tensor, others: Tensor, out: Tensor) -> None:
    """Write the L2 norm of all numbers of two vectors into `out`, (); all float32, contiguous."""
    if (kernels := working_kernels(out.device)) is not None:
        kernels.write_total(norms, others, out)
    else:
        total = torch.linalg.vector_norm(torch.cat((norms, others)), dtype=torch.float64)
        out.copy_(total if is_asynchronous(out) else fitted(total, torch.float32))


def working_kernels(device: torch.device) -> Any:
    """Return `pgt_diag.kernels`, or None where they do not work: Triton is not everywhere."""
    if device.type != "cuda":
        return None
    if device not in _kernels and not torch.cuda.is_current_stream_capturing():
        kernels = None
        if importlib.util.find_spec("triton") is not None:
            kernels = importlib.import_module("pgt_diag.kernels")
        _kernels[device] = kernels if kernels is not None and kernels.usable(device) else None
    return _kernels.get(device)


_kernels: dict[torch.device, Any] = {}


def take_norms_again(weight: Tensor, norms: Tensor) -> None:
    """Correct, on a CPU, the norms (filters,) whose squares were too small or too large to add up.

    weight: (filters, ...), of which they are the norms.
    """
    found = _odd(norms.numpy())
    if len(found) == 0:
        return
    odd = torch.from_numpy(found)
    rows = weight.detach().flatten(1).index_select(0, odd)
    least, largest = torch.aminmax(rows)
    if least != 0 or largest != 0:
        norms[odd] = fitted(exact_norms(rows), norms.dtype)


def _odd(norms: NDArray[Any]) -> NDArray[np.intp]:
    """Return where norms are not to be trusted."""
    return np.flatnonzero((norms < SAFE_NORM) | (norms == np.inf))


def exact_norms(rows: Tensor) -> Tensor:
    """Return L2 norms over all dims but the first, (n,) float64, of numbers of any size."""
    numbers = rows.flatten(1).double()
    largest = numbers.abs().amax(1, keepdim=True)
    # 0, infinity and NaN are to stay what they are.
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(numbers / scale, dim=1)
    return norms * scale[:, 0]


def fitted(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 norms in another dtype: what is neither 0 nor infinite becomes neither."""
    limits = torch.finfo(dtype)
    inside = norms.clamp(limits.tiny * limits.eps, limits.max)
    return torch.where((norms == 0) | norms.isinf(), norms, inside).to(dtype)


def add_activity(values: Tensor, reading: Reading, outs: Sequence[Tensor]) -> None:
    """Add to every `out` something above 0, or NaN, for each channel that is not silent in a map.

    values: (N, C, ...); outs: (C,) float32, contiguous, none of them below 0.
    """
    kernels = working_kernels(values.device)
    positive = reading == "positive"
    if kernels is not None and kernels.mark_active(values, outs, positive=positive):
        return
    activity = read_map(values, reading)
    for out in outs:
        out.add_(activity)


def add_activity_and_gap(
    values: Tensor, reading: Reading, outs: Sequence[Tensor], gap: Tensor
) -> None:
    """Do what `add_activity` does, and add to `gap` the squares of `read_map_and_gap`.

    values: (N, C, ...); outs, gap: (C,) float32, contiguous; outs may be none.
    """
    kernels = working_kernels(values.device)
    if kernels is not None and kernels.add_gap(values, gap, positive=reading == "positive"):
        if outs:
            add_activity(values, reading, outs)
        return
    activity, squares = read_map_and_gap(values, reading)
    gap.add_(squares)
    for out in outs:
        out.add_(activity)


def read_map(values: Tensor, reading: Reading) -> Tensor:
    """Reduce a map (N, C, ...) to (C,) float32: 0 exactly where the whole channel is silent.

    Elsewhere it is any positive number, or NaN. Of a large map on a CPU, channels that a few images
    show to be active are not looked at in the others.
    """
    large = values.numel() >= _LARGE and len(values) > _FEW_IMAGES
    if not large or is_asynchronous(values):
        return _reduce(values, reading)
    activity = _reduce(values[:_FEW_IMAGES], reading)
    quiet = (activity == 0).nonzero()[:, 0]
    if 2 * len(quiet) > len(activity):
        return activity + _reduce(values[_FEW_IMAGES:], reading)
    if len(quiet):
        activity[quiet] = _reduce(values[_FEW_IMAGES:].index_select(1, quiet), reading)
    return activity


def _reduce(values: Tensor, reading: Reading) -> Tensor:
    dims = (0, *range(2, values.dim()))
    if reading == "sum":
        if values.is_cuda or not values.is_contiguous():
            return values.sum(dims, dtype=torch.float32)
        if values.shape[2:].numel() <= _FEW_PIXELS:
            over_batch = values.flatten(1).sum(0, dtype=torch.float32)
            return over_batch.view(values.shape[1], -1).sum(1)
        return values.flatten(2).sum(2, dtype=torch.float32).sum(0)
    if reading == "peak":
        peak: Tensor = torch.linalg.vector_norm(values, ord=torch.inf, dim=dims)
        return peak.float()
    return values.amax(dims).clamp_min(0).float()


def read_map_and_gap(values: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Return `read_map` and the GAP features' squares, both (C,) float32, in one pass.

    A GAP feature is the spatial mean of the post-activation map; its squares are summed over the
    batch, so that batches add up.
    """
    spatial = tuple(range(2, values.dim()))
    if reading != "sum":
        shown = values.clamp_min(0) if reading == "positive" else values
        means = shown.mean(spatial, dtype=torch.float32)
        return read_map(values, reading), means.square().sum(0)
    sums = values.sum(spatial, dtype=torch.float32)
    return sums.sum(0), (sums / values.shape[2:].numel()).square().sum(0)
