"""Triton kernels for a GPU: what the recorder measures, in few launches and few bytes.

torch's own operations take two launches for each layer's norms, and read all of every map. Each
kernel here has a plain counterpart in `reductions.py` or in torch, which is used where Triton is
not there or does not work: see `usable`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_WEIGHTS = 64
"""In one launch: each of them is an argument of the kernel."""
_BLOCK, _WARPS = 1024, 4
_TOGETHER = 2
"""Filters of one program: finding its weight takes as long as reading a few hundred numbers."""
_ROWS, _CHANNELS = 32, 64
"""What a program reads at a time, each of its threads 16 bytes, where channels lie side by side."""
_BLOCKS = 8
"""How often a program does so that only reads."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    tl.store(out + number, tl.sqrt(tl.sum(total, 1)).to(tl.float32), mask=inside)


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
    tl.store(gradient_out + number, tl.sqrt(tl.sum(gradient_total, 0)).to(tl.float32))
    tl.store(weight_out + number, tl.sqrt(tl.sum(weight_total, 0)).to(tl.float32))


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
    tl.store(out, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


@triton.jit
def _mark(actives, channel, seen, count: tl.constexpr, row_block: tl.constexpr):
    """Put 1 into all `actives` where a channel was seen in any row, (rows, channels)."""
    # Each thread what it has seen: to agree with the others first takes longer.
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
    row_block: tl.constexpr,
    channel_block: tl.constexpr,
):
    """Write max(values, 0), NaN where it is NaN, and 1 to all `actives` where a channel is not 0.

    A row is the channels of one pixel of one image, which lie side by side. Nearly all programs
    find that others have marked their channels.
    """
    channel = tl.program_id(1) * channel_block + tl.arange(0, channel_block)
    marked = tl.load(actives[0] + channel, mask=channel < channels, other=1.0)
    first = tl.program_id(0).to(tl.int64) * row_block
    row = tl.arange(0, row_block)
    inside = (first + row < rows)[:, None] & (channel < channels)[None, :]
    place = first * channels + row[:, None] * channels + channel[None, :]
    value = tl.load(values + place, mask=inside, other=0.0)
    result = tl.where(value <= 0, 0.0, value)
    tl.store(results + place, result, mask=inside)
    _mark(actives, channel, (result != 0) & (marked == 0)[None, :], count, row_block)


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
    marked = tl.load(actives[0] + channel, mask=inside, other=1.0)
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


@triton.jit(do_not_specialize=["width"])
def keep_kernel(row, blank, kept, width, block: tl.constexpr):
    """Copy a row to `kept`, and what is blank to the row."""
    place = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(row + place, mask=place < width)
    tl.store(kept + place, values, mask=place < width)
    tl.store(row + place, tl.load(blank + place, mask=place < width), mask=place < width)


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


def write_filter_norms(weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Write every filter's L2 norm; what `reductions.filter_norms` does.

    weights: (filters, ...) each, of one dtype, each filter dense in memory (see `is_dense`); outs:
    (filters,) float32 each, contiguous; all on one GPU.
    """
    pairs = list(zip(weights, outs, strict=True))
    for start in range(0, len(pairs), _MOST_WEIGHTS):
        some = pairs[start : start + _MOST_WEIGHTS]
        wide = [pair for pair in some if _is_aligned(pair[0])]
        some = [*wide, *(pair for pair in some if not _is_aligned(pair[0]))]
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
        wide = [update for update in some if all(map(_is_aligned, update[:3]))]
        some = [*wide, *(update for update in some if not all(map(_is_aligned, update[:3])))]
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


def _is_aligned(weight: Tensor) -> bool:
    # What Triton finds of its arguments: whether they are multiples of 16.
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


def write_relu(values: Tensor, results: Tensor, actives: Sequence[Tensor]) -> None:
    """Write `torch.relu(values)`, and 1 into each of `actives` where a channel of it is not silent.

    values: (N, C, H, W), see `takes_relu`; results: like it, or itself; actives: (C,) float32 each,
    contiguous, left as they are where the channel is silent.
    """
    channels = values.shape[1]
    rows = values.numel() // channels
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        relu_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(channels, _CHANNELS))](
            values,
            results,
            tuple(actives),
            rows,
            channels,
            count=len(actives),
            row_block=_ROWS,
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


def keep_row(row: Tensor, blank: Tensor, kept: Tensor) -> None:
    """Copy a row to `kept`, and what is blank to the row: (width,) float32 each, contiguous."""
    with torch.cuda.device_of(row):  # type: ignore[no-untyped-call]
        keep_kernel[(triton.cdiv(len(row), _BLOCK),)](row, blank, kept, len(row), block=_BLOCK)


def usable(device: torch.device) -> bool:
    """Whether the kernels run on the device and are right there: Triton needs a compiler, too."""
    told = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # looking at the results waits for them
    try:
        return _work(device)
    except Exception:  # whatever a missing compiler, an old driver or another GPU may raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(told)


def _work(device: torch.device) -> bool:
    return _norms_work(device) and _maps_work(device)


def _norms_work(device: torch.device) -> bool:
    random = torch.Generator().manual_seed(0)
    shapes = ((5, 3, 3), (3, 1500), (7, 64, 3, 3))
    weights = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    weights[0][1] *= 1e-30
    weights[0][2] = 0
    outs = [torch.full((len(weight),), -1.0, device=device) for weight in weights]
    write_filter_norms(weights, outs)
    expected = [weight.double().flatten(1).norm(dim=1) for weight in weights]
    pairs = list(zip(outs, expected, strict=True))
    total = torch.full((2,), -1.0, device=device)
    write_total(outs[0], outs[1], total[0])
    pairs += [(total, torch.stack((torch.cat(expected[:2]).norm(), total.new_tensor(-1.0))))]
    kept = torch.zeros(3, device=device)
    row, blank = outs[1].clone(), torch.ones(3, device=device)
    keep_row(row, blank, kept)
    pairs += [(kept, expected[1]), (row, blank)]
    return all(
        torch.allclose(one.double(), other.double(), rtol=1e-5, atol=0) for one, other in pairs
    )


def _maps_work(device: torch.device) -> bool:
    values = torch.zeros(40, 70, 6, 5, device=device)
    values[-1, 1::2, -1, -1] = 1e-30
    values[0, 2, 0, 0] = -1
    last = values.contiguous(memory_format=torch.channels_last)
    right = True
    for shown in (values, last):
        for positive in (True, False):
            actives = torch.zeros(2, 70, device=device).unbind()
            read = mark_active(shown, actives, positive=positive)
            expected = (shown > 0 if positive else shown != 0).any(3).any(2).any(0)
            right = right and read and all(bool((each == expected).all()) for each in actives)
            squares = torch.ones(70, device=device)
            added = add_gap(shown, squares, positive=positive)
            means = (shown.clamp_min(0) if positive else shown).double().mean((2, 3))
            expected = 1 + means.square().sum(0)
            right = right and added and torch.allclose(squares.double(), expected)
    results, active = torch.full_like(last, -1.0), torch.zeros(70, device=device)
    write_relu(last, results, [active])
    wanted = last.relu()
    expected = (wanted > 0).any(3).any(2).any(0)
    return right and torch.equal(results, wanted) and bool((active == expected).all())
