"""What the hooks compute, as pure tensor maths: filter norms, silence, spatial means."""

from typing import Literal

import torch
from torch import Tensor

# Squares of float32 numbers below this lose digits or underflow to 0; the norm is taken again.
_SAFE_NORM = 1e-15

Reading = Literal["sum", "peak", "positive"]
"""How a hook reads a map: "sum" of a non-negative one, "peak" |value| of a signed one, or the
"positive" part of what a ReLU without a module of its own is about to take."""


def filter_norms(weight: Tensor, out: Tensor) -> Tensor:
    """Write the L2 norm of every filter, without underflow, into `out`.

    weight: (filters, ...) of any float dtype; out: (filters,) float32. A filter of 1e-42 has a
    norm above 0: only a filter of zeros has the norm 0. Returns `out`.
    """
    dims = tuple(range(1, weight.dim()))
    if weight.is_cuda:
        # float64 in registers: no waiting for the device to see which filters are small.
        return out.copy_(torch.linalg.vector_norm(weight, dim=dims, dtype=torch.float64))
    if weight.dtype == torch.float32:
        torch.linalg.vector_norm(weight, dim=dims, out=out)
    else:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        out.copy_(torch.linalg.vector_norm(weight, dim=dims, dtype=dtype))
    small = out < _SAFE_NORM
    if small.any():
        out[small] = torch.linalg.vector_norm(weight[small].double(), dim=dims).float()
    return out


def read_map(values: Tensor, reading: Reading) -> Tensor:
    """Reduce a map (N, C, ...) to (C,) float32: 0 exactly where the whole channel is silent."""
    dims = (0, *range(2, values.dim()))
    if reading == "sum":
        return values.sum(dims, dtype=torch.float32)
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
