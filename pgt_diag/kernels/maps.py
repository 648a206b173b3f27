"""Maps: which channels are silent, in a ReLU or afterwards, and the squares of GAP features."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _CHANNELS = 32, 64
"""What a program reads at a time, each of its threads 16 bytes, where channels lie side by side."""
_BLOCKS = 8
"""How often a program does so at most."""
_PROGRAMS = 256
"""How many programs are enough: two for each multiprocessor."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _marks(actives, channel, inside):
    """Return what others have marked; not from a multiprocessor's own cache, which is not told."""
    return tl.load(actives[0] + channel, mask=inside, other=1.0, cache_modifier=".cg")


@triton.jit
def _mark(actives, channel, seen, count: tl.constexpr, row_block: tl.constexpr):
    """Put 1 into all `actives` where a channel was seen in any row, (rows, channels)."""
    place = tl.zeros((row_block, 1), tl.int32) + channel[None, :]
    for index in tl.static_range(count):
        tl.store(actives[index] + place, 1.0, mask=seen)


@triton.jit(do_not_specialize=["rows"])
def relu_kernel(
    values,
    results,
    actives,
    rows,
    channels,
    count: tl.constexpr,
    blocks: tl.constexpr,
    agree: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Write max(values, 0), NaN where it is NaN, and 1 to all `actives` where a channel is not 0.

    A row is the channels of one pixel of one image, which lie side by side. agree: the threads of a
    program mark together; otherwise each marks what it has seen and others have not.
    """
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    first = tl.program_id(0).to(tl.int64) * (blocks * row_block)
    seen = tl.zeros((row_block, channel_block), tl.int1)
    for block in tl.static_range(blocks):
        row = block * row_block + tl.arange(0, row_block)
        inside = (first + row < rows)[:, None] & (channel < channels)[None, :]
        place = first * channels + row[:, None] * channels + channel[None, :]
        value = tl.load(values + place, mask=inside, other=0.0)
        result = tl.where(value <= 0, 0.0, value)
        tl.store(results + place, result, mask=inside)
        seen |= result != 0
    if agree:
        together = tl.max(seen.to(tl.int32), 0) > 0
        for index in tl.static_range(count):
            tl.store(actives[index] + channel, 1.0, mask=together)
    else:
        marked = _marks(actives, channel, channel < channels)
        _mark(actives, channel, seen & (marked == 0)[None, :], count, row_block)


@triton.jit(do_not_specialize=["images", "channels", "pixels"])
def active_kernel(
    values,
    actives,
    images,
    channels,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    count: tl.constexpr,
    positive: tl.constexpr,
    blocks: tl.constexpr,
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Put 1 into all `actives` where a channel has a number other than 0.

    positive: a number above 0, or NaN. A row is one pixel of one image. A program reads a few
    channels of some rows, unless others have marked all of its channels.
    """
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    inside = channel < channels
    marked = _marks(actives, channel, inside)
    if tl.min(marked, 0) == 0:
        rows = images.to(tl.int64) * pixels
        first = tl.program_id(0).to(tl.int64) * (blocks * row_block)
        seen = tl.zeros((row_block, channel_block), tl.int1)
        for block in tl.static_range(blocks):
            row = first + block * row_block + tl.arange(0, row_block)
            place = (row // pixels) * image_stride + (row % pixels) * pixel_stride
            value = tl.load(
                values + place[:, None] + channel[None, :].to(tl.int64) * channel_stride,
                mask=(row < rows)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            seen |= (value <= 0) == 0 if positive else value != 0
        seen &= (marked == 0)[None, :]
        # What lies outside was read as 0, which is not above 0.
        _mark(actives, channel, seen, count, row_block)


@triton.jit(do_not_specialize=["channels", "pixels"])
def means_kernel(
    values,
    means,
    channels,
    pixels,
    image_stride,
    channel_stride,
    pixel_stride,
    positive: tl.constexpr,
    pixel_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Write the spatial means of a map, (images, channels)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    inside = channel < channels
    begin = values + image * image_stride + channel.to(tl.int64)[None, :] * channel_stride
    total = tl.zeros((pixel_block, channel_block), tl.float32)
    for start in range(0, pixels, pixel_block):
        pixel = start + tl.arange(0, pixel_block)
        mask = (pixel < pixels)[:, None] & inside[None, :]
        value = tl.load(begin + pixel[:, None] * pixel_stride, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(value <= 0, 0.0, value) if positive else value
    tl.store(means + image * channels + channel, tl.sum(total, 0) / pixels, mask=inside)


@triton.jit(do_not_specialize=["images", "channels"])
def squares_kernel(
    means,
    squares,
    images,
    channels,
    image_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Add each channel's sum of its squared means, (images, channels), to `squares`."""
    channel = tl.program_id(0) * channel_block + tl.arange(0, channel_block)
    inside = channel < channels
    total = tl.zeros((image_block, channel_block), tl.float32)
    for start in range(0, images, image_block):
        image = start + tl.arange(0, image_block)
        mask = (image < images)[:, None] & inside[None, :]
        value = tl.load(means + image[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        total += value * value
    before = tl.load(squares + channel, mask=inside, other=0.0)
    tl.store(squares + channel, before + tl.sum(total, 0), mask=inside)


def takes_relu(values: Tensor) -> bool:
    """Whether `write_relu` takes such a map: its channels lie side by side."""
    return (
        type(values) is Tensor
        and values.dim() == 4
        and values.dtype in _FLOATS
        and values.numel() > 0
        and not values._is_view()
        and values.is_contiguous(memory_format=torch.channels_last)
    )


def write_relu(
    values: Tensor, results: Tensor, actives: Sequence[Tensor], *, agree: bool | None = None
) -> None:
    """Write `torch.relu(values)`, and 1 into each of `actives` where a channel of it is not silent.

    values: (N, C, H, W), see `takes_relu`; results: like it, or itself; actives: (C,) float32 each,
    contiguous, left as they are where the channel is silent. agree: see `relu_kernel`; by default
    in a large map.
    """
    channels = values.shape[1]
    rows = values.numel() // channels
    columns = triton.cdiv(channels, _CHANNELS)
    share = triton.cdiv(rows, _ROWS) * columns // _PROGRAMS
    if agree is None:
        # Few programs are done sooner if their threads do not wait for each other; many would all
        # mark the same channels at the same time.
        agree = share > 16
    row_block = 2 * _ROWS if agree else _ROWS
    blocks = 4 if agree else 1 << min(3, max(0, share.bit_length() - 1))
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        relu_kernel[(triton.cdiv(rows, blocks * row_block), columns)](
            values,
            results,
            tuple(actives),
            rows,
            channels,
            count=len(actives),
            blocks=blocks,
            agree=agree,
            row_block=row_block,
            channel_block=_CHANNELS,
            num_warps=8,
        )


def mark_active(values: Tensor, actives: Sequence[Tensor], *, positive: bool) -> bool:
    """Put 1 where a channel of a map is not silent; return whether the map could be read.

    values: (N, C, ...) of any float dtype; actives: (C,) float32 each, contiguous, left as they are
    where the channel is silent. positive: as if a ReLU had been there. It cannot be read when the
    pixels of a channel lie at no constant distance.
    """
    flat = _with_flat_pixels(values)
    if flat is None:
        return False
    images, channels, pixels = flat.shape
    # What lies side by side in memory is read together.
    last = flat.stride(1) == 1 and channels > 1
    rows, together = (_ROWS, _CHANNELS) if last else (512, 4)
    grid = (triton.cdiv(images * pixels, _BLOCKS * rows), triton.cdiv(channels, together))
    with torch.cuda.device_of(flat):  # type: ignore[no-untyped-call]
        active_kernel[grid](
            flat,
            tuple(actives),
            images,
            channels,
            pixels,
            *flat.stride(),
            count=len(actives),
            positive=positive,
            blocks=_BLOCKS,
            row_block=rows,
            channel_block=together,
            num_warps=8,
        )
    return True


def add_gap(values: Tensor, squares: Tensor, *, positive: bool) -> bool:
    """Add the squares of the GAP features, summed over the batch; return whether it could be done.

    values: (N, C, ...) of any float dtype; squares: (C,) float32, contiguous. positive: of the map
    as if a ReLU had been there. It cannot be done when `mark_active` cannot read the map.
    """
    flat = _with_flat_pixels(values)
    if flat is None:
        return False
    images, channels, pixels = flat.shape
    means = flat.new_empty(images, channels, dtype=torch.float32)
    with torch.cuda.device_of(flat):  # type: ignore[no-untyped-call]
        means_kernel[(images, triton.cdiv(channels, 64))](
            flat,
            means,
            channels,
            pixels,
            *flat.stride(),
            positive=positive,
            pixel_block=min(16, triton.next_power_of_2(pixels)),
            channel_block=64,
        )
        squares_kernel[(triton.cdiv(channels, 16),)](
            means, squares, images, channels, image_block=64, channel_block=16
        )
    return True


def _with_flat_pixels(values: Tensor) -> Tensor | None:
    """Return a map as (N, C, pixels), or None where that takes a copy or nothing is in it."""
    try:
        flat = values.view(*values.shape[:2], -1)
    except RuntimeError:
        return None
    return flat if flat.numel() else None
