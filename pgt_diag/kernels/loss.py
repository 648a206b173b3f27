"""The PowerGrad loss of rows of logits: a pass over them forward, and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 2048
_ROWS = 1024
"""Losses that the one program which adds them up reads at a time."""


@triton.jit(do_not_specialize=["alpha", "smoothing", "ignore_index"])
def losses_kernel(
    logits,
    target,
    losses,
    normalizers,
    classes,
    row_stride,
    target_stride,
    alpha,
    smoothing,
    ignore_index,
    smooth: tl.constexpr,
    block: tl.constexpr,
):
    """Write each row's loss, 0 where it is ignored, and log Σ exp(α·z).

    The loss is NaN where the target is no class: nothing is read outside the row.
    """
    row = tl.program_id(0)
    begin = logits + row.to(tl.int64) * row_stride
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    powers = tl.zeros((), tl.float32)
    plain = tl.zeros((), tl.float32)
    for start in range(0, classes, block):
        column = start + tl.arange(0, block)
        mask = column < classes
        z = tl.load(begin + column, mask=mask, other=float("-inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(z, 0))
        # −inf − (−inf) would be NaN.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(z - base), 0)
        # 0^0 is 1 (Prop. 1): at α = 0 a class with p = 0 counts as every other.
        exponent = tl.where(alpha == 0, 0.0, alpha * (z - base))
        shift = tl.where(alpha == 0, 0.0, alpha * (before - base))
        powers = powers * tl.exp(shift) + tl.sum(tl.where(mask, tl.exp(exponent), 0.0), 0)
        if smooth:
            plain += tl.sum(tl.where(mask, z, 0.0), 0)
    index = tl.load(target + row.to(tl.int64) * target_stride).to(tl.int64)
    is_class = (index >= 0) & (index < classes)
    hit = tl.load(begin + index, mask=is_class, other=float("nan")).to(tl.float32)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    normalizer = base + tl.log(total)
    loss = normalizer - hit
    if smooth:
        loss = (1 - smoothing) * loss + smoothing * (normalizer - plain / classes)
    tl.store(losses + row, tl.where(index == ignore_index, 0.0, loss))
    tl.store(normalizers + row, alpha * base + tl.log(powers))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def reduce_kernel(
    losses,
    target,
    loss,
    divisor,
    rows,
    target_stride,
    ignore_index,
    mean: tl.constexpr,
    block: tl.constexpr,
):
    """Write the sum of the losses; with `mean` their mean, and what that divided by."""
    total = tl.zeros((block,), tl.float32)
    counted = tl.zeros((block,), tl.int32)
    for start in range(0, rows, block):
        row = start + tl.arange(0, block)
        mask = row < rows
        total += tl.load(losses + row, mask=mask, other=0.0)
        if mean:
            index = tl.load(target + row.to(tl.int64) * target_stride, mask=mask, other=0)
            counted += (mask & (index.to(tl.int64) != ignore_index)).to(tl.int32)
    if mean:
        count = tl.sum(counted, 0).to(tl.float32)
        tl.store(divisor, count)
        tl.store(loss, tl.sum(total, 0) / count)
    else:
        tl.store(loss, tl.sum(total, 0))


@triton.jit(do_not_specialize=["alpha", "smoothing", "ignore_index"])
def gradient_kernel(
    logits,
    target,
    normalizers,
    divisor,
    grad_loss,
    gradient,
    classes,
    row_stride,
    target_stride,
    grad_stride,
    alpha,
    smoothing,
    ignore_index,
    mean: tl.constexpr,
    block: tl.constexpr,
):
    """Write (p' − q)·grad_loss, with `mean` divided, 0 where a row is ignored."""
    row = tl.program_id(0)
    index = tl.load(target + row.to(tl.int64) * target_stride).to(tl.int64)
    scale = tl.load(grad_loss + row.to(tl.int64) * grad_stride).to(tl.float32)
    if mean:
        scale = scale / tl.load(divisor)
    normalizer = tl.load(normalizers + row)
    begin = row.to(tl.int64) * classes
    for start in range(0, classes, block):
        column = start + tl.arange(0, block)
        mask = column < classes
        z = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=mask, other=0.0)
        exponent = tl.where(alpha == 0, 0.0, alpha * z.to(tl.float32))
        q = tl.where(column == index, 1 - smoothing, 0.0) + smoothing / classes
        slope = tl.where(index == ignore_index, 0.0, scale * (tl.exp(exponent - normalizer) - q))
        tl.store(gradient + begin + column, slope.to(gradient.dtype.element_ty), mask=mask)


def takes_loss(logits: Tensor, target: Tensor) -> bool:
    """Whether `write_losses` takes these: rows of logits, and an index for each."""
    return (
        type(logits) in (Tensor, torch.nn.Parameter)
        and logits.dim() == 2
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits.numel() > 0
        and logits.stride(1) == 1
        and target.shape == logits.shape[:1]
        and target.dtype in (torch.int64, torch.uint8)
        and target.device == logits.device
    )


def write_losses(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and what `write_gradient` needs; see `takes_loss`.

    The loss is () or (N,) float32; kept are log Σ exp(α·z) of every row and, for a mean, the number
    of rows that are not ignored, (N + 1,) float32.
    """
    rows, classes = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    kept = logits.new_empty(rows + 1, dtype=torch.float32)
    block, warps = _block(classes)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        losses_kernel[(rows,)](
            logits,
            target,
            losses,
            kept,
            classes,
            logits.stride(0),
            target.stride(0),
            alpha,
            smoothing,
            ignore_index,
            smooth=smoothing != 0,
            block=block,
            num_warps=warps,
        )
        if reduction == "none":
            return losses, kept
        loss = logits.new_empty((), dtype=torch.float32)
        reduce_kernel[(1,)](
            losses,
            target,
            loss,
            kept[rows:],
            rows,
            target.stride(0),
            ignore_index,
            mean=reduction == "mean",
            block=_ROWS,
        )
    return loss, kept


def write_gradient(
    logits: Tensor,
    target: Tensor,
    kept: Tensor,
    grad_loss: Tensor,
    *,
    alpha: float,
    smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Return the gradient at the logits, (N, C) of their dtype; kept as `write_losses` returns it.

    grad_loss: () or, with the reduction "none", (N,), float32.
    """
    rows, classes = logits.shape
    gradient = logits.new_empty(rows, classes)
    block, warps = _block(classes)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        gradient_kernel[(rows,)](
            logits,
            target,
            kept,
            kept[rows:],
            grad_loss,
            gradient,
            classes,
            logits.stride(0),
            target.stride(0),
            grad_loss.stride(0) if reduction == "none" else 0,
            alpha,
            smoothing,
            ignore_index,
            mean=reduction == "mean",
            block=block,
            num_warps=warps,
        )
    return gradient


def _block(classes: int) -> tuple[int, int]:
    """Return how many logits a program reads at a time, and by how many warps."""
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(classes))
    return block, min(8, max(1, block // 256))
