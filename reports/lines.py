"""Packs thousands of lines into a few hundred kilobytes of text that a browser unpacks fast.

Values become 15-bit codes over [0, top] with code 0 kept for an exact zero, then differences in
time, which so fit into 16 bits, then two byte planes, then raw deflate, then base64. `unpack` is
the plain reference of the browser's decoder in static/lines.js.
"""

import base64
import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

MISSING = 32767
"""Code of NaN and infinity."""

MAX_LEVELS = 32766
"""Largest code of a value; codes 1..levels are the values, 0 is an exact zero."""

MIN_LEVELS = 767
"""Coarsest scale: a step is under half a pixel of a 300-pixel panel."""

QUIET_STEP = 4
"""Wanted size, in codes, of a typical step in time: finer than that would store noise."""


@dataclass(frozen=True)
class PackedLines:
    """Lines as text: decode with `unpack`.

    `top` is the value of code `levels`; `data` is base64 of the raw deflate stream.
    """

    lines: int
    rows: int
    top: float
    levels: int
    data: str


def pack(values: np.ndarray) -> PackedLines:
    """Pack norms, one line a column.

    values: (rows, lines) float, not negative. The error of a value is at most half of
    `top / (levels - 1)`; exact zeros stay exact, and nothing else becomes zero.
    """
    rows, lines = values.shape
    finite = np.isfinite(values)
    top = float(np.max(values, where=finite, initial=0.0)) or 1.0
    levels = _levels(values, top)
    codes = _codes(values, finite, top, levels).T  # (lines, rows): neighbours in time together
    steps = codes.astype(np.int32)
    steps[:, 1:] -= codes[:, :-1]
    # Zigzag keeps small steps of either sign in the low byte, so that the high plane is all zeros.
    zigzag = (steps << 1) ^ (steps >> 31)
    planes = np.stack([zigzag & 0xFF, zigzag >> 8]).astype(np.uint8)
    deflate = zlib.compressobj(level=6, wbits=-15, strategy=zlib.Z_FILTERED)
    packed = deflate.compress(planes.tobytes()) + deflate.flush()
    return PackedLines(lines, rows, top, levels, base64.b64encode(packed).decode("ascii"))


def unpack(packed: PackedLines) -> np.ndarray:
    """Return the (rows, lines) float32 values; the reference for the browser's decoder."""
    raw = zlib.decompress(base64.b64decode(packed.data), wbits=-15)
    planes = np.frombuffer(raw, np.uint8).reshape(2, packed.lines, packed.rows).astype(np.int32)
    zigzag = planes[0] | planes[1] << 8
    codes = np.cumsum((zigzag >> 1) ^ -(zigzag & 1), axis=1)
    values = (codes - 1) * (packed.top / (packed.levels - 1))
    # Code 1 stands for "too small to tell from zero, and yet not zero": half a step.
    values[codes == 1] = 0.25 * packed.top / (packed.levels - 1)
    values[codes == 0] = 0.0
    values[codes == MISSING] = np.nan
    return values.T.astype(np.float32)


def thin(table: pd.DataFrame, rows: int, lowest: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return at most `rows` rows of norms, evenly spread, without losing a dip.

    A kept row shows its own value, unless the line fell below half of it since the row kept
    before: then it shows that minimum. `lowest` has the minima between stored rows (the
    recorder's window), of the same shape as `table`.
    """
    count = len(table)
    values = table.to_numpy(np.float32)
    lows = values if lowest is None or lowest.shape != table.shape else lowest.to_numpy(np.float32)
    if count <= rows and lows is values:
        return table
    kept = (
        np.arange(count) if count <= rows else np.linspace(0, count - 1, rows).round().astype(int)
    )
    starts = np.concatenate([[0], kept[:-1] + 1])
    floor = np.fmin.reduceat(lows, starts, axis=0) if count else lows
    chosen = values[kept]
    shown = np.where(floor < 0.5 * chosen, floor, chosen)
    return pd.DataFrame(shown, index=table.index[kept], columns=table.columns)


def _levels(values: np.ndarray, top: float) -> int:
    """Choose the scale: as fine as 15 bits allow, but no finer than the lines' own noise."""
    with np.errstate(invalid="ignore"):
        steps = np.abs(np.diff(values[:, :: max(1, values.shape[1] // 64)], axis=0)) / top
    steps = steps[np.isfinite(steps) & (steps > 0)]
    if not steps.size:
        return MAX_LEVELS
    wanted = QUIET_STEP / float(np.median(steps))
    return int(np.clip(wanted, MIN_LEVELS, MAX_LEVELS))


def _codes(values: np.ndarray, finite: np.ndarray, top: float, levels: int) -> np.ndarray:
    scaled = np.where(finite, values, 0.0).astype(np.float64) * ((levels - 1) / top)
    codes = np.rint(scaled).astype(np.uint16) + np.uint16(1)
    codes[finite & (values == 0)] = 0
    codes[~finite] = MISSING
    return codes
