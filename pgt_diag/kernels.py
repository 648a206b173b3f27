"""Triton kernels for a GPU: every filter's norm, and which channels are silent, in a launch each.

torch's own operations take two launches for each layer's norms, and read all of every map. Each
kernel here has a plain counterpart in `reductions.py`, which is used where Triton is not there or
does not work: see `usable`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_WEIGHTS = 32
"""In one launch: each of them is an argument of the kernel."""
_BLOCK = 1024
_PROGRAMS = 512
"""How many programs look for silence in a map: a few for each multiprocessor."""


@triton.jit
def norms_kernel(rows, outs, firsts, fans, count: tl.constexpr, block: tl.constexpr):
    """Write the L2 norm of filter `program_id` of count weights, in float64 until it is rounded.

    rows: pointers to the weights; outs: to where their norms go; firsts: the number of each
    weight's first filter; fans: how many numbers a filter of it has.
    """
    number = tl.program_id(0)
    row, out, fan = rows[0] + number.to(tl.int64) * fans[0], outs[0] + number, fans[0]
    for i in tl.static_range(1, count):
        here = number - firsts[i]
        row = tl.where(here >= 0, rows[i] + here.to(tl.int64) * fans[i], row)
        out = tl.where(here >= 0, outs[i] + here, out)
        fan = tl.where(here >= 0, fans[i], fan)
    total = tl.zeros((block,), tl.float64)
    for start in range(0, fan, block):
        column = start + tl.arange(0, block)
        values = tl.load(row + column, mask=column < fan, other=0.0).to(tl.float64)
        total += values * values
    tl.store(out, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


@triton.jit(do_not_specialize=["images", "channels", "pixels"])
def active_kernel(
    values,
    active,
    images,
    channels,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    positive: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Put 1 into `active` where a channel has a number other than 0 (positive: above 0, or NaN).

    A program looks at a few channels of every so many rows, a row being one pixel of one image, and
    ends as soon as it has seen all of its channels to be active.
    """
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    inside = channel < channels
    found = tl.where(inside, 0, 1)
    rows = images.to(tl.int64) * pixels
    start = tl.program_id(0).to(tl.int64) * row_block
    while (start < rows) & (tl.min(found, 0) == 0):
        row = start + tl.arange(0, row_block)
        place = (row // pixels) * image_stride + (row % pixels) * pixel_stride
        value = tl.load(
            values + place[:, None] + channel[None, :].to(tl.int64) * channel_stride,
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        seen = (value <= 0) == 0 if positive else value != 0
        found = tl.maximum(found, tl.max(seen.to(tl.int32), 0))
        start += tl.num_programs(0).to(tl.int64) * row_block
    tl.store(active + channel, 1.0, mask=inside & (found > 0))


def write_filter_norms(weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Write every filter's L2 norm; what `reductions.filter_norms` does.

    weights: (filters, ...) each, of one dtype, each filter dense in memory (see `is_dense`); outs:
    (filters,) float32 each, contiguous; all on one GPU.
    """
    for start in range(0, len(weights), _MOST_WEIGHTS):
        some, theirs = weights[start : start + _MOST_WEIGHTS], outs[start : start + _MOST_WEIGHTS]
        firsts = [0]
        for weight in some:
            firsts.append(firsts[-1] + len(weight))
        fans = tuple(weight.numel() // len(weight) for weight in some)
        with torch.cuda.device_of(some[0]):  # type: ignore[no-untyped-call]
            norms_kernel[(firsts.pop(),)](
                tuple(some), tuple(theirs), tuple(firsts), fans, count=len(some), block=_BLOCK
            )


def is_dense(weight: Tensor) -> bool:
    """Whether each filter's numbers lie side by side, and the filters one after the other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(weight.dim())
    return weight.numel() > 0 and (
        weight.is_contiguous() or (last is not None and weight.is_contiguous(memory_format=last))
    )


def mark_active(values: Tensor, active: Tensor, *, positive: bool) -> bool:
    """Put 1 where a channel of a map is not silent; return whether the map could be read.

    values: (N, C, ...) of any float dtype; active: (C,) float32, contiguous, left as it is where
    the channel is silent. positive: as if a ReLU had been there. It cannot be read when the pixels
    of a channel lie at no constant distance.
    """
    try:
        flat = values.view(*values.shape[:2], -1)
    except RuntimeError:
        return False
    images, channels, pixels = flat.shape
    if flat.numel() == 0:
        return False
    # What lies side by side in memory is read together.
    rows, together = (32, 64) if flat.stride(1) == 1 and channels > 1 else (512, 4)
    columns = triton.cdiv(channels, together)
    splits = max(1, min(_PROGRAMS // columns, triton.cdiv(images * pixels, rows)))
    with torch.cuda.device_of(flat):  # type: ignore[no-untyped-call]
        active_kernel[(splits, columns)](
            flat,
            active,
            images,
            channels,
            pixels,
            *flat.stride(),
            positive=positive,
            row_block=rows,
            channel_block=together,
        )
    return True


def usable(device: torch.device) -> bool:
    """Whether the kernels run on the device and are right there: Triton needs a compiler, too."""
    told = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # looking at the results waits for them
    try:
        return _works(device)
    except Exception:  # whatever a missing compiler, an old driver or another GPU may raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(told)


def _works(device: torch.device) -> bool:
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random).to(device) for shape in ((5, 3, 3), (3, 1500))]
    weights[0][1] *= 1e-30
    weights[0][2] = 0
    outs = [torch.full((len(weight),), -1.0, device=device) for weight in weights]
    write_filter_norms(weights, outs)
    right = all(
        torch.allclose(out.double(), weight.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0)
        for out, weight in zip(outs, weights, strict=True)
    )
    values = torch.zeros(40, 70, 6, 5, device=device)
    values[-1, 1::2, -1, -1] = 1e-30
    values[0, 2, 0, 0] = -1
    for shown in (values, values.contiguous(memory_format=torch.channels_last)):
        for positive in (True, False):
            active = torch.zeros(70, device=device)
            read = mark_active(shown, active, positive=positive)
            expected = (shown > 0 if positive else shown != 0).any(3).any(2).any(0)
            right = right and read and bool((active == expected).all())
    return right
