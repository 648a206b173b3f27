"""A step of SGD that writes the norms of what it has read and written."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgt_diag.kernels.norms import is_aligned, root_of

_MOST_WEIGHTS = 64
"""In one launch: each of them is an argument of the kernel."""
_BLOCK, _WARPS = 1024, 4


@triton.jit
def _update(
    weight,
    gradient,
    momentum,
    gradient_out,
    weight_out,
    number,
    fan,
    lr,
    skipped,
    beta,
    decay,
    nesterov: tl.constexpr,
    block: tl.constexpr,
):
    """Make a step of SGD for filter `number`, and write the norms of its gradient and itself."""
    begin = number.to(tl.int64) * fan
    gradient_total = tl.zeros((block,), tl.float64)
    weight_total = tl.zeros((block,), tl.float64)
    for start in range(0, fan, block):
        column = start + tl.arange(0, block)
        mask, place = column < fan, begin + column
        value = tl.load(weight + place, mask=mask, other=0.0)
        slope = tl.load(gradient + place, mask=mask, other=0.0)
        before = tl.load(momentum + place, mask=mask, other=0.0)
        decayed = slope + decay * value
        velocity = beta * before + decayed
        change = decayed + beta * velocity if nesterov else velocity
        after = tl.where(skipped, value, value - lr * change)
        tl.store(weight + place, after, mask=mask)
        tl.store(momentum + place, tl.where(skipped, before, velocity), mask=mask)
        gradient_total += slope.to(tl.float64) * slope.to(tl.float64)
        weight_total += after.to(tl.float64) * after.to(tl.float64)
    tl.store(gradient_out + number, root_of(tl.sum(gradient_total, 0)))
    tl.store(weight_out + number, root_of(tl.sum(weight_total, 0)))


@triton.jit
def _update_one(
    group,
    weights,
    gradients,
    momenta,
    gradient_outs,
    weight_outs,
    firsts,
    fans,
    lr,
    skipped,
    beta,
    decay,
    nesterov: tl.constexpr,
    start: tl.constexpr,
    end: tl.constexpr,
    block: tl.constexpr,
):
    """Do what `_update` does for filter `group` of the weights from `start` to `end`."""
    weight, gradient, momentum = weights[start], gradients[start], momenta[start]
    gradient_out, weight_out = gradient_outs[start], weight_outs[start]
    first, fan = firsts[start], fans[start]
    for i in tl.static_range(start + 1, end):
        here = group >= firsts[i]
        weight = tl.where(here, weights[i], weight)
        gradient = tl.where(here, gradients[i], gradient)
        momentum = tl.where(here, momenta[i], momentum)
        gradient_out = tl.where(here, gradient_outs[i], gradient_out)
        weight_out = tl.where(here, weight_outs[i], weight_out)
        first = tl.where(here, firsts[i], first)
        fan = tl.where(here, fans[i], fan)
    _update(
        weight,
        gradient,
        momentum,
        gradient_out,
        weight_out,
        group - first,
        fan,
        lr,
        skipped,
        beta,
        decay,
        nesterov,
        block,
    )


@triton.jit(do_not_specialize=["lr", "beta", "decay"])
def sgd_kernel(
    weights,
    gradients,
    momenta,
    gradient_outs,
    weight_outs,
    firsts,
    fans,
    lr,
    skip,
    beta,
    decay,
    lr_is_pointer: tl.constexpr,
    may_skip: tl.constexpr,
    nesterov: tl.constexpr,
    aligned: tl.constexpr,
    count: tl.constexpr,
    block: tl.constexpr,
):
    """Make a step of SGD with momentum, and write the norms that `norms_kernel` would.

    The norms are those of the gradients, and of the weights after the step. firsts: the number of
    each weight's first filter, and that of all filters. lr: a number, or where it lies; skip: where
    a number lies that is not 0 if nothing is to change. The rest as in `norms_kernel`.
    """
    group = tl.program_id(0)
    rate = tl.load(lr) if lr_is_pointer else lr
    skipped = tl.load(skip) != 0 if may_skip else group < 0
    if group < firsts[aligned]:
        _update_one(
            group,
            weights,
            gradients,
            momenta,
            gradient_outs,
            weight_outs,
            firsts,
            fans,
            rate,
            skipped,
            beta,
            decay,
            nesterov,
            0,
            aligned,
            block,
        )
    else:
        _update_one(
            group,
            weights,
            gradients,
            momenta,
            gradient_outs,
            weight_outs,
            firsts,
            fans,
            rate,
            skipped,
            beta,
            decay,
            nesterov,
            min(aligned, count - 1),
            count,
            block,
        )


class Update(NamedTuple):
    """What a step does to one parameter, in place.

    weight, gradient, momentum: (filters, ...) float32, dense (see `is_dense`) and laid out alike;
    gradient_norms, weight_norms: (filters,) float32, contiguous: those of the gradient, and of the
    weight after the step.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    gradient_norms: Tensor
    weight_norms: Tensor


def step_sgd(
    updates: Sequence[Update],
    lr: Tensor | float,
    skip: Tensor | None,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Make a step of `torch.optim.SGD` without dampening, and write norms; see `Update`.

    lr: a number, or a tensor of one on the device; skip: of one number, not 0 if nothing is to
    change but the norms are to be written.
    """
    for start in range(0, len(updates), _MOST_WEIGHTS):
        some = updates[start : start + _MOST_WEIGHTS]
        wide = [update for update in some if all(map(is_aligned, update[:3]))]
        some = [*wide, *(update for update in some if not all(map(is_aligned, update[:3])))]
        firsts = [0, *itertools.accumulate(len(update.weight) for update in some)]
        with torch.cuda.device_of(some[0].weight):  # type: ignore[no-untyped-call]
            sgd_kernel[(firsts[-1],)](
                *map(tuple, zip(*some, strict=True)),
                tuple(firsts),
                tuple(update.weight.numel() // len(update.weight) for update in some),
                lr,
                skip,
                momentum,
                weight_decay,
                lr_is_pointer=isinstance(lr, Tensor),
                may_skip=skip is not None,
                nesterov=nesterov,
                aligned=len(wide),
                count=len(some),
                block=_BLOCK,
                num_warps=_WARPS,
            )
