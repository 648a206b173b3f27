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
UNKNOWN_INK = (128, 128, 128, 110)


@dataclass(frozen=True)
class ZeroOutMap:
    """Dead filters per layer (rows) and time bin (columns, named by their first iteration).

    `dead` counts the filters dead at the end of each bin, `unknown` those of which nobody can tell;
    `share` divides the dead by the layer's filters; `revivals` has one row per revival: layer,
    iteration, filter.
    """

    dead: pd.DataFrame
    unknown: pd.DataFrame
    share: pd.DataFrame
    revivals: pd.DataFrame
    iteration_count: int


def zero_out_map(summary: RunSummary, columns: int = COLUMNS) -> ZeroOutMap:
    """Count the dead filters of every layer over time; empty where nothing is recorded."""
    count = summary.run.iteration_count
    names = [layer.name for layer in summary.run.layers]
    filters = np.array([layer.filters for layer in summary.run.layers])
    edges = np.unique(np.linspace(0, count, min(columns, count) + 1).astype(int))
    dead = _dead_over_time(summary.deaths, names, edges)
    possible = _dead_over_time(summary.possible, names, edges)
    revivals = summary.revived.rename(columns={"iteration": "death"}).rename(
        columns={"revival_iteration": "iteration"}
    )[["layer", "iteration", "filter"]]
    share = dead.div(filters, axis=0) if names else dead
    return ZeroOutMap(dead, possible - dead, share, revivals.reset_index(drop=True), count)


def _dead_over_time(deaths: pd.DataFrame, names: list[str], edges: np.ndarray) -> pd.DataFrame:
    """Count who is dead at the end of each bin, layers × bins."""
    steps = np.zeros((len(names), len(edges)), np.int64)
    row = deaths["layer"].map({name: place for place, name in enumerate(names)}).to_numpy(int)
    revived = deaths["revival_iteration"].notna().to_numpy()
    # The bin that holds the iteration counts it: a death shows at once, a revival likewise.
    began = np.searchsorted(edges, deaths["iteration"].to_numpy(), "right") - 1
    back = deaths.loc[revived, "revival_iteration"].to_numpy(np.int64)
    np.add.at(steps, (row, began), 1)
    np.add.at(steps, (row[revived], np.searchsorted(edges, back, "right") - 1), -1)
    return pd.DataFrame(np.cumsum(steps, axis=1)[:, :-1], index=names, columns=edges[:-1])


def map_png(share: pd.DataFrame, unknown: pd.DataFrame | None = None) -> str:
    """Return the map as a data URI: a pixel per layer and bin, more opaque where more are dead.

    A single dead filter is already visible: opacity starts at 20 %, and grows with the root of
    the share, because most layers lose few. Where none is dead for sure and `unknown` has some, the
    pixel is grey.
    """
    values = share.to_numpy(np.float64)
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.where(values > 0, 255 * (0.2 + 0.8 * np.sqrt(np.clip(values, 0, 1))), 0)
    if unknown is not None:
        pixels[(unknown.to_numpy() > 0) & (values == 0)] = UNKNOWN_INK
    return png_uri(Image.fromarray(pixels, "RGBA"))


def png_uri(image: Image.Image, **options: int) -> str:
    """Return an image as a data URI in PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
