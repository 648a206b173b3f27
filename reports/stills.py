"""Fig. 3 without JavaScript: each panel as a small picture, which only `<noscript>` holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from reports.figures import OKABE_ITO, panel_range
from reports.panels import Panel
from reports.text import number
from reports.zeroout import png_uri

WIDTH, HEIGHT = 420, 150
RUG = 5
"""Pixels below the lines where the zero-out instants are marked."""

FULL_PANELS = 18
"""Panels up to which the pictures have full size; more share the same number of pixels."""

_NOTHING, _MARK = 0, len(OKABE_ITO) + 1


@dataclass(frozen=True)
class Still:
    """A panel's picture as a data URI with the ends of its axes."""

    uri: str
    top: str
    bottom: str
    last: str


def stills(panels: Sequence[Panel], last_iteration: int) -> list[Still | None]:
    """Draw the panels; None for one that has only a message."""
    scale = min(1.0, math.sqrt(FULL_PANELS / max(1, len(panels))))
    return [None if each.message else still(each, last_iteration, scale) for each in panels]


def still(panel: Panel, last_iteration: int, scale: float = 1.0) -> Still:
    """Draw a panel's lines, each in one of seven colours, over its row's shared y range."""
    width, height = max(64, int(WIDTH * scale)), max(32, int(HEIGHT * scale))
    low, high = panel_range(panel)
    pixels = np.full((height + RUG, width), _NOTHING, np.uint8)
    span = max(1, last_iteration)
    _draw(pixels[:height], panel.norms, span, low, high)
    died = panel.deaths["iteration"].to_numpy(np.float64) * (width - 1) / span
    pixels[height + 1 :, died.astype(int)] = _MARK
    return Still(
        uri=png_uri(_image(pixels), transparency=_NOTHING, bits=4),
        top=number(high),
        bottom=number(low),
        last=f"{last_iteration:,}",
    )


def _draw(pixels: np.ndarray, norms: pd.DataFrame, span: int, low: float, high: float) -> None:
    """Fill, for every line and pixel column, the span from its lowest to its highest value."""
    height, width = pixels.shape
    x, values = _dense(norms, span, width)
    columns = np.minimum(x.astype(int), width - 1)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    # With the value before, so that a line's spans touch from column to column.
    before = values[np.maximum(starts - 1, 0)]
    least = np.fmin(np.fmin.reduceat(values, starts, axis=0), before)
    most = np.fmax(np.fmax.reduceat(values, starts, axis=0), before)
    column, line = np.nonzero(np.isfinite(least) & np.isfinite(most))
    to_pixel = (height - 1) / (high - low)
    ends = [
        np.clip((high - table[column, line]) * to_pixel, 0, height - 1).astype(np.int16)
        for table in (most, least)
    ]
    row, last = ends
    place, ink = columns[starts][column], (1 + line % len(OKABE_ITO)).astype(np.uint8)
    while len(row):
        pixels[row, place] = ink
        more = row < last
        row, last, place, ink = row[more] + 1, last[more], place[more], ink[more]


def _dense(norms: pd.DataFrame, span: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in pixels and values, at least two to a pixel column."""
    x = norms.index.to_numpy(np.float64) * width / span
    values = norms.to_numpy(np.float64)  # the largest float32 times 1.04 is none
    values = np.where(np.isfinite(values), values, np.nan)  # 0 × ∞ is not for a picture
    count = 2 * int(np.ceil(x[-1] - x[0])) + 1
    if len(x) >= count or len(x) < 2:
        return x, values
    wanted = np.linspace(x[0], x[-1], count)
    after = np.clip(np.searchsorted(x, wanted), 1, len(x) - 1)
    share = ((wanted - x[after - 1]) / (x[after] - x[after - 1]))[:, None]
    return wanted, values[after - 1] * (1 - share) + values[after] * share


def _image(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels, "P")
    inks = ["#ffffff", *OKABE_ITO, "#808080"]
    image.putpalette(bytes.fromhex("".join(ink[1:] for ink in inks)))
    return image
