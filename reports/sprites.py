"""Fig. 4: the second layer's feature maps of real images, as one PNG sprite per run.

A sprite holds a tile for every stored iteration (left to right) and image (top to bottom); a tile
is a grid of all channels. One picture per run costs a browser a tenth of a grid of heat maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from reports.source import FeatureMaps, Run
from reports.summary import RunSummary
from reports.zeroout import png_uri

MAX_PIXELS = 1_200_000
"""Most map values that all sprites of a page may hold; larger maps are averaged down."""

CELL, GAP, LEVELS = 32, 3, 48

_DEAD_INK, _SILENT_INK, _PAPER_INK = 253, 254, 255
_MARKS = {_DEAD_INK: (213, 94, 0), _SILENT_INK: (86, 180, 233), _PAPER_INK: (128, 128, 128)}


@dataclass(frozen=True)
class Sprite:
    """A run's feature maps as pictures, with what they show in numbers.

    `states` is the table of `channel_states`; `inputs` one data URI per image.
    """

    uri: str
    width: int
    height: int
    iterations: tuple[int, ...]
    labels: tuple[str, ...]
    channels: int
    layer: str
    inputs: tuple[str, ...]
    states: pd.DataFrame


def channel_states(summary: RunSummary) -> pd.DataFrame:
    """Say, for every snapshot shown, image and channel, whether its map is zero, its filter dead.

    Columns iteration, image, channel, zero (the map of this image is 0 everywhere), dead (the
    channel is in a death of the event log at that iteration).
    """
    tables = []
    for snapshot in _of_one_layer(summary.run.feature_maps):
        images, channels = snapshot.maps.shape[:2]
        dead = _dead_channels(summary, snapshot, channels)
        tables.append(
            pd.DataFrame(
                {
                    "iteration": snapshot.iteration,
                    "image": np.repeat(np.arange(images), channels),
                    "channel": np.tile(np.arange(channels), images),
                    "zero": ~np.any(snapshot.maps, axis=(2, 3)).ravel(),
                    "dead": np.tile(dead, images),
                }
            )
        )
    columns = ["iteration", "image", "channel", "zero", "dead"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def sprite(summary: RunSummary, most_pixels: int = MAX_PIXELS) -> Sprite | None:
    """Draw a run's feature maps; None where there are none."""
    snapshots = _of_one_layer(summary.run.feature_maps)
    if not snapshots:
        return None
    first = snapshots[0]
    # All tiles must have one shape: a resumed run may have started with other images.
    snapshots = [each for each in snapshots if each.maps.shape == first.maps.shape]
    images, channels = first.maps.shape[:2]
    states = channel_states(summary)
    side = max(4, math.isqrt(most_pixels // (len(snapshots) * images * channels)))
    tiles = [
        [_tile(snapshot, image, side, states) for image in range(images)] for snapshot in snapshots
    ]
    pixels = np.concatenate([np.concatenate(column, axis=0) for column in tiles], axis=1)
    height, width = tiles[0][0].shape
    return Sprite(
        uri=png_uri(_palette_image(pixels), transparency=_PAPER_INK),
        width=width,
        height=height,
        iterations=tuple(int(each.iteration) for each in snapshots),
        labels=tuple(first.labels),
        channels=channels,
        layer=first.layer,
        inputs=tuple(_input(image) for image in first.images),
        states=states,
    )


def sprites(summaries: Sequence[RunSummary]) -> list[Sprite | None]:
    """Draw the sprites of all runs within one budget of pixels."""
    return [sprite(summary, MAX_PIXELS // max(1, len(summaries))) for summary in summaries]


def _of_one_layer(snapshots: Sequence[FeatureMaps]) -> list[FeatureMaps]:
    """Return those of the layer that has the most, the first of them: a picture is of one layer."""
    names = [each.layer for each in snapshots]
    return [each for each in snapshots if each.layer == max(names, key=names.count)]


def layer_position(run: Run, name: str) -> int | None:
    """Return the paper's index of a layer by name."""
    return next((layer.index for layer in run.layers if layer.name == name), None)


def _dead_channels(summary: RunSummary, snapshot: FeatureMaps, channels: int) -> np.ndarray:
    deaths = summary.deaths[summary.deaths["layer"] == snapshot.layer]
    end = deaths["revival_iteration"].astype("Int64").fillna(np.iinfo(np.int64).max)
    # A snapshot is named by the iterations done before it: the last of them is the one before.
    last = max(0, snapshot.iteration - 1)
    now = (deaths["iteration"] <= last) & (end > last)
    dead = np.zeros(channels, bool)
    dead[deaths.loc[now, "filter"].to_numpy(int)] = True
    return dead


def _tile(snapshot: FeatureMaps, image: int, side: int, states: pd.DataFrame) -> np.ndarray:
    """Return one image's channels as palette indices, a grid about as wide as high."""
    maps = _shrunk(snapshot.maps[image], side)
    channels, height, width = maps.shape
    # One scale for all channels of the picture, so that a fading channel looks faded; the root
    # keeps the quiet ones visible, and a percentile keeps one loud channel from darkening all.
    positive = np.maximum(np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0), 0.0)
    scale = float(np.percentile(positive, 99.5)) or float(positive.max()) or 1.0
    levels = np.sqrt(np.clip(positive / scale, 0, 1)) * (LEVELS - 1)
    zoom = max(1, CELL // max(height, width))
    cells = levels.round().astype(np.uint8).repeat(zoom, axis=1).repeat(zoom, axis=2)
    here = states[(states["iteration"] == snapshot.iteration) & (states["image"] == image)]
    columns = math.ceil(math.sqrt(channels))
    rows = math.ceil(channels / columns)
    high, wide = cells.shape[1] + GAP, cells.shape[2] + GAP
    tile = np.full((rows * high + GAP, columns * wide + GAP), _PAPER_INK, np.uint8)
    for channel, (zero, dead) in enumerate(zip(here["zero"], here["dead"], strict=True)):
        row, column = divmod(channel, columns)
        top, left = row * high, column * wide
        cell = cells[channel]
        if zero or dead:
            _mark(cell, dead)
            ink = _DEAD_INK if dead else _SILENT_INK
            tile[top : top + high + GAP, left : left + wide + GAP] = np.where(
                tile[top : top + high + GAP, left : left + wide + GAP] == _PAPER_INK,
                ink,
                tile[top : top + high + GAP, left : left + wide + GAP],
            )
        tile[top + GAP : top + high, left + GAP : left + wide] = cell
    return tile


def _mark(cell: np.ndarray, dead: bool) -> None:
    """Draw a cross (dead) or one diagonal (zero for this image only) into a cell, in place."""
    height, width = cell.shape
    steps = np.arange(max(height, width) * 2)
    y = (steps * (height - 1) / (len(steps) - 1)).round().astype(int)
    x = (steps * (width - 1) / (len(steps) - 1)).round().astype(int)
    thick = np.minimum(x + 1, width - 1)
    ink = _DEAD_INK if dead else _SILENT_INK
    cell[y[::-1], x] = cell[y[::-1], thick] = ink
    if dead:
        cell[y, x] = cell[y, thick] = ink


def _shrunk(maps: np.ndarray, side: int) -> np.ndarray:
    """Average maps (channels, height, width) down until no side is longer than `side`."""
    factor = math.ceil(max(maps.shape[1:]) / min(side, 64))
    if factor <= 1:
        return maps
    channels, height, width = maps.shape
    rows, columns = max(1, height // factor), max(1, width // factor)
    cut = maps[:, : rows * factor, : columns * factor]
    return np.asarray(
        cut.reshape(channels, rows, cut.shape[1] // rows, columns, cut.shape[2] // columns).mean(
            axis=(2, 4)
        )
    )


def _palette_image(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels, "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[:LEVELS] = np.linspace(0, 255, LEVELS).round()[:, None]
    for place, colour in _MARKS.items():
        palette[place] = colour
    image.putpalette(palette.tobytes())
    return image


def _input(image: np.ndarray) -> str:
    """Return an input image, (3, height, width) uint8, as a data URI."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)), "RGB")
    if max(picture.size) > 224:
        picture.thumbnail((224, 224))
    return png_uri(picture)
