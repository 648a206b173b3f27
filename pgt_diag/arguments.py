"""What callers of the library pass, checked at the call: a mistake there is one line, at once.

Whatever would only fail at a later step, or leave a run that nobody can read, is found here.
"""

import json
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pgt_diag.config import RunConfig, shorten
from pgt_diag.directory import SCHEMA_VERSION
from pgt_diag.errors import ConfigurationError, RunDirectoryError
from pgt_diag.reading import MAX_COUNT, MAX_MAPS_BYTES, MAX_METRICS, METRICS, check_info

Place = str | tuple[str, int]
"""A module by its name, or one of its calls in a forward pass, counted from 1."""
Places = Place | list[Place]

_OWN_ENTRIES = frozenset(
    {
        "collapsed_ratio",
        "created",
        "digests",
        "ended",
        "gap_source",
        "iterations",
        "layers",
        "message",
        "min_spell",
        "overhead",
        "record_every",
        "schema_version",
        "sha256",
        "snapshots",
        "status",
        "zeroed_ratio",
    }
)
"""What the recorder itself writes into run.json."""
_AROUND_MAPS = 1 << 20
"""Bytes that labels and headers may take in a snapshot."""


def count(name: str, value: object) -> int:
    """Return a whole number of at least 1; ConfigurationError for anything else."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number < MAX_COUNT:
        raise ConfigurationError(
            f"{name} is {_shown(value)}; it must be a whole number of at least 1"
        )
    return number


def fraction(name: str, value: object) -> float:
    """Return a number in [0, 1]; ConfigurationError for anything else."""
    # Written so that NaN, which fails every comparison, fails this one.
    if not (is_number(value) and 0 <= value <= 1):  # type: ignore[operator]
        raise ConfigurationError(f"{name} is {_shown(value)}; it must lie in [0, 1]")
    return float(value)  # type: ignore[arg-type]


def is_number(value: object) -> bool:
    """Whether this is a real number of Python's or NumPy's, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_attached(model: object, directory: object, optimizer: object, resume: object) -> None:
    """Raise ConfigurationError for what a recorder cannot be attached to."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is {_shown(model)}; it must be a torch.nn.Module")
    if any(isinstance(each, UninitializedParameter) for each in model.parameters()):
        raise ConfigurationError(
            "model has lazy layers without weights; make one forward pass before recording"
        )
    if not isinstance(directory, str | os.PathLike):
        raise ConfigurationError(f"directory is {_shown(directory)}; it must be a path")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"optimizer is {_shown(optimizer)}; it must be a torch.optim.Optimizer"
        )
    if resume is not None and not isinstance(resume, Mapping):
        raise ConfigurationError(
            f"resume is {_shown(resume)}; it must be what a recorder's state_dict() returned"
        )


def module_calls(name: str, places: object) -> list[tuple[str, int | None]]:
    """Return modules named by hand, each with the number of its call if one is given.

    Raises ConfigurationError for anything but `Places`.
    """
    found: list[tuple[str, int | None]] = []
    for place in places if isinstance(places, list) and places else [places]:
        if isinstance(place, str):
            found.append((place, None))
        elif isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str):
            found.append((place[0], count(f"{name}: the call of '{place[0]}'", place[1])))
        else:
            raise ConfigurationError(
                f"{name} is {_shown(places)}; give a module's name, or its name and which of its "
                "calls, ('relu', 2)"
            )
    return found


def check_entries(name: str, values: object) -> None:
    """Raise ConfigurationError for entries of run.json that are not the caller's, or unreadable."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(f"{name} is {_shown(values)}; it must be a dict with text as keys")
    for key in values:
        if key in _OWN_ENTRIES:
            raise ConfigurationError(
                f"{name} has '{key}', which the recorder writes itself; choose another key"
            )
    try:
        plain = json.loads(json.dumps(dict(values), default=str))
        check_info({**plain, "schema_version": SCHEMA_VERSION}, Path(name))
        if plain.get("config") is not None:
            RunConfig.from_mapping(plain["config"])
    except (TypeError, ValueError, RecursionError, RunDirectoryError) as error:
        remedy = "give plain JSON values, and keys of your own"
        raise ConfigurationError(f"{name} cannot be kept in run.json: {error}; {remedy}") from None


def check_scalars(values: Mapping[str, object]) -> None:
    """Raise ConfigurationError for what is not one number, or a tensor of one."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ConfigurationError(
                    f"{name} has shape {tuple(value.shape)}; it must be one number"
                )
        elif type(value) is not float and not is_number(value):
            raise ConfigurationError(f"{name} is {_shown(value)}; it must be a number or a tensor")


def check_filters(name: str, values: Mapping[str, object], filters: Mapping[str, int]) -> None:
    """Raise ConfigurationError unless every layer's values are a tensor with one of each filter."""
    for layer, each in values.items():
        if not isinstance(each, Tensor) or each.shape != (filters[layer],):
            has = f"has shape {tuple(each.shape)}" if isinstance(each, Tensor) else "is no tensor"
            raise ConfigurationError(
                f"{name}['{layer}'] {has}; it must be a tensor of {filters[layer]} numbers, one a "
                "filter"
            )


def epoch_row(values: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """Return a row of metrics.csv that can be read again; a tensor of one number becomes that.

    columns: those of the first row; none before it. Raises ConfigurationError for other columns,
    and for no number where reports calculate with one.
    """
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(f"values is {_shown(values)}; give a dict with text as keys")
    if not values or len(values) > MAX_METRICS:
        raise ConfigurationError(
            f"values has {len(values):,} entries; a row has 1 to {MAX_METRICS:,}"
        )
    other = [key for key in values if columns and key not in columns]
    if other:
        raise ConfigurationError(
            f"values has '{other[0]}', and the first call's columns are {', '.join(columns)}"
        )
    row = {
        key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in values.items()
    }
    for key in METRICS:
        value = row.get(key)
        if not (is_number(value) or (value is None and key != "epoch")) and key in row:
            raise ConfigurationError(f"{key} is {_shown(value)}; it must be a number")
    if "epoch" in (columns or row) and not 0 <= row.get("epoch", -1) < MAX_COUNT:
        raise ConfigurationError(
            f"epoch is {_shown(row.get('epoch'))}; it must be a number of at least 0, in every row"
        )
    return row


def check_snapshot(
    layer: object, layers: int, images: object, originals: object, labels: Sequence[str]
) -> None:
    """Raise ConfigurationError unless a snapshot of these can be taken, and read again."""
    if type(layer) is not int or not 0 <= layer < layers:
        raise ConfigurationError(
            f"layer is {_shown(layer)}; there are {layers} convolutions, counted from 0"
        )
    if not isinstance(images, Tensor) or images.dim() < 3 or not images.is_floating_point():
        raise ConfigurationError(
            f"images is {_shown(images)}; it must be a batch of floats, as the model takes them"
        )
    pictures = isinstance(originals, Tensor) and originals.dim() == 4 and originals.shape[1] == 3
    if not pictures or originals.dtype != torch.uint8:  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"originals is {_shown(originals)}; it must be (n, 3, H, W) of uint8"
        )
    sizes = (len(images), len(originals), len(labels))  # type: ignore[arg-type]
    if len(set(sizes)) > 1 or not all(originals.shape):  # type: ignore[attr-defined]
        raise ConfigurationError(
            "there are {} images, {} originals and {} labels; give one of each for every image, "
            "and at least one".format(*sizes)
        )


def check_maps(name: str, maps: Tensor, images: Tensor) -> None:
    """Raise ConfigurationError for a layer's maps that a snapshot cannot hold."""
    if maps.dim() != 4 or len(maps) != len(images):
        raise ConfigurationError(
            f"the maps of '{name}' have shape {tuple(maps.shape)}; a snapshot holds (n, C, H, W), "
            f"of {len(images)} images"
        )
    size = 4 * maps.numel() + images.numel() + _AROUND_MAPS
    if size > MAX_MAPS_BYTES:
        raise ConfigurationError(
            f"the maps of '{name}' and the images have {size / 1e6:,.0f} MB, and a snapshot holds "
            f"no more than {MAX_MAPS_BYTES / 1e6:,.0f}; give fewer images"
        )


def _shown(value: object) -> str:
    """Return what was passed in as few words as tell it."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    return repr(value[:100]) if isinstance(value, str) else shorten(value)
