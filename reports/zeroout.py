"""The zero-out map: which share of each layer is dead, over time, with the revivals."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from reports.summary import RunSummary

COLUMNS = 300
INK = (213, 94, 0)
"""Okabe-Ito vermilion; the map is this ink on nothing, so that it suits light and dark pages."""


@dataclass(frozen=True)
class ZeroOutMap:
    """Dead filters per layer (rows) and time bin (columns, named by their first iteration).

    `dead` counts the filters dead at the end of each bin; `share` divides by the layer's filters;
    `revivals` has one row per revival: layer, iteration, filter.
    """

    dead: pd.DataFrame
    share: pd.DataFrame
    revivals: pd.DataFrame
    iteration_count: int


def zero_out_map(summary: RunSummary, columns: int = COLUMNS) -> ZeroOutMap:
    """Count the dead filters of every layer over time; empty where nothing is recorded."""
    count = summary.run.iteration_count
    names = [layer.name for layer in summary.run.layers]
    filters = np.array([layer.filters for layer in summary.run.layers])
    edges = np.unique(np.linspace(0, count, min(columns, count) + 1).astype(int))
    steps = np.zeros((len(names), len(edges)), np.int64)
    row = {name: place for place, name in enumerate(names)}
    for death in summary.death_list:
        # The bin that holds the iteration counts it: a death shows at once, a revival likewise.
        steps[row[death.layer], np.searchsorted(edges, death.iteration, "right") - 1] += 1
        if death.revival is not None:
            steps[row[death.layer], np.searchsorted(edges, death.revival, "right") - 1] -= 1
    dead = pd.DataFrame(np.cumsum(steps, axis=1)[:, :-1], index=names, columns=edges[:-1])
    revivals = summary.revived.rename(columns={"iteration": "death"}).rename(
        columns={"revival_iteration": "iteration"}
    )[["layer", "iteration", "filter"]]
    share = dead.div(filters, axis=0) if names else dead
    return ZeroOutMap(dead, share, revivals.reset_index(drop=True), count)


def map_png(share: pd.DataFrame) -> str:
    """Return the map as a data URI: a pixel per layer and bin, more opaque where more are dead.

    A single dead filter is already visible: opacity starts at 20 %, and grows with the root of
    the share, because most layers lose few.
    """
    values = share.to_numpy(np.float64)
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.where(values > 0, 255 * (0.2 + 0.8 * np.sqrt(np.clip(values, 0, 1))), 0)
    return png_uri(Image.fromarray(pixels, "RGBA"))


def png_uri(image: Image.Image, **options: int) -> str:
    """Return an image as a data URI in PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
