"""What the hooks compute, as pure tensor maths: filter norms, silence, spatial means."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# Squares of float32 numbers below this lose digits or underflow to 0; the norm is taken again.
_SAFE_NORM = 1e-15
# With fewer pixels to a map, the CPU adds up faster over the batch first.
_FEW_PIXELS = 16

Reading = Literal["sum", "peak", "positive"]
"""How a hook reads a map: "sum" of a non-negative one, "peak" |value| of a signed one, or the
"positive" part of what a ReLU without a module of its own is about to take."""


def filter_norms(weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Write the L2 norm of every filter of each weight, without underflow, into its `out`.

    weights: (filters, ...) each, of any float dtype, on one device; out: (filters,) float32 each. A
    filter of 1e-42 has a norm above 0: only a filter of zeros has the norm 0.
    """
    for weight, norms in zip(weights, out, strict=True):
        dims = tuple(range(1, weight.dim()))
        if weight.is_cuda:
            # float64 in registers: no waiting for the device to see which filters are small.
            norms.copy_(torch.linalg.vector_norm(weight, dim=dims, dtype=torch.float64))
        elif weight.dtype == torch.float32:
            torch.linalg.vector_norm(weight, dim=dims, out=norms)
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            norms.copy_(torch.linalg.vector_norm(weight, dim=dims, dtype=dtype))
    if weights and not weights[0].is_cuda:
        for weight, norms in zip(weights, out, strict=True):
            _take_small_norms_again(weight, norms)


def _take_small_norms_again(weight: Tensor, norms: Tensor) -> None:
    small = (norms < _SAFE_NORM).nonzero()[:, 0]
    if len(small) == 0:
        return
    rows = weight.detach().flatten(1).index_select(0, small)
    least, largest = torch.aminmax(rows)
    if least != 0 or largest != 0:
        norms[small] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).float()


def read_map(values: Tensor, reading: Reading) -> Tensor:
    """Reduce a map (N, C, ...) to (C,) float32: 0 exactly where the whole channel is silent."""
    dims = (0, *range(2, values.dim()))
    if reading == "sum":
        if values.is_cuda or not values.is_contiguous():
            return values.sum(dims, dtype=torch.float32)
        if values.shape[2:].numel() < _FEW_PIXELS:
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
