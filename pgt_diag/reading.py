"""Reading a run directory that a stranger may have made: every check there is, in one place.

Nothing is unpickled, links are not followed, and sizes are checked before memory is taken. Raises
RunDirectoryError, naming the file.
"""

import fcntl
import io
import math
import os
import typing
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgt_diag import storage
from pgt_diag.directory import (
    FEATURE_MAPS_NAME,
    LOCK_FILE,
    MAX_RUN_FILE_BYTES,
    RUN_FILE,
    SCHEMA_VERSION,
    open_info,
    what_is_left,
)
from pgt_diag.errors import RunDirectoryError

if TYPE_CHECKING:
    import pandas as pd

Ending = Literal["finished", "interrupted", "diverged", "failed"]
Status = Literal["running", "finished", "interrupted", "diverged", "failed"]
MAX_MAPS_BYTES = 1 << 30
_MAX_LAYERS, _MAX_FILTERS = 4_096, 1 << 20
MAX_COUNT = 1 << 48


@dataclass(frozen=True)
class Layer:
    """A recorded convolution: qualified name, the paper's index, filters, what was observed."""

    name: str
    index: int
    filters: int
    weight_shape: tuple[int, ...]
    activation: str
    addition: bool | None = None
    """Whether two maps are added between the convolution and its activation: then a filter of zeros
    still gets a gradient. None where that was not seen, or no activation follows."""

    @property
    def seen(self) -> bool:
        """Whether a hook saw its post-activation map, so that silence could be told."""
        return self.activation != NOT_SEEN


NOT_SEEN = "not seen"
"""What is recorded as the activation of a layer whose map no hook could read."""


@dataclass(frozen=True)
class FeatureMaps:
    """Post-activation maps of one layer for fixed images at one iteration.

    maps: (images, channels, H, W) float32; images: (images, 3, H', W') uint8; labels: the images'
    classes. `iteration` is the number of iterations done when they were taken.
    """

    iteration: int
    layer: str
    maps: NDArray[np.float32]
    images: NDArray[np.uint8]
    labels: tuple[str, ...]


def read_info(path: Path) -> dict[str, Any]:
    """Return run.json's entries, those that pgt-diag uses of the right types."""
    file = path / RUN_FILE
    try:
        info = open_info(storage.read(file, MAX_RUN_FILE_BYTES))
    except FileNotFoundError:
        if left := what_is_left(path):
            raise RunDirectoryError(
                f"{path}: damaged run: {RUN_FILE} is missing, and of the rest there is "
                f"{', '.join(left)}; bring it back, or move the directory away"
            ) from None
        raise RunDirectoryError(f"{path}: no run here ({RUN_FILE} is missing)") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunDirectoryError(f"{file}: damaged or unreadable: {error}") from None
    check_info(info, file)
    return info


def check_info(info: dict[str, Any], file: Path) -> None:
    """Raise RunDirectoryError, naming the file, unless pgt-diag can use these entries."""
    version = info.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{file}: schema version {version}, and this pgt-diag reads {SCHEMA_VERSION}; "
            "use the pgt-diag that recorded it"
        )
    for key, kinds in _INFO_TYPES.items():
        value = info.get(key)
        small = not isinstance(value, int) or (value is not True and 0 <= value < MAX_COUNT)
        if not (value is None or (isinstance(value, kinds) and small)):
            raise RunDirectoryError(f"{file}: '{key}' is {str(value)[:100]!r}, which it cannot be")
    if info.get("status") not in (None, *typing.get_args(Status)):
        raise RunDirectoryError(f"{file}: 'status' is {info['status']!r}, which it cannot be")
    overhead = info.get("overhead") or {}
    if overhead and not all(is_amount(overhead.get(key)) for key in _OVERHEAD):
        raise RunDirectoryError(f"{file}: 'overhead' does not say how many seconds")


_OVERHEAD = ("recorder_seconds", "training_seconds")


def is_amount(value: object) -> bool:
    """Whether this is a finite number that is not negative."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < MAX_COUNT  # type: ignore[operator]


def is_count(value: object) -> TypeGuard[int]:
    """Whether this can be how many of something there are."""
    return type(value) is int and 0 <= value < MAX_COUNT


_INFO_TYPES: dict[str, tuple[type, ...]] = {
    "status": (str,),
    "message": (str,),
    "model": (str,),
    "command": (list,),
    "config": (dict,),
    "record_every": (int,),
    "planned_iterations": (int,),
    "iterations": (int,),
    "overhead": (dict,),
    "layers": (list,),
    "resumed_from": (list,),
    "changed_data": (list,),
    "bad_images": (list,),
    "digests": (dict,),
    "snapshots": (list,),
}


def digests_of(info: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return the fingerprints that run.json has for a file; none while it is not sealed."""
    found = (info.get("digests") or {}).get(name) or ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def read_layers(path: Path, entries: list[Any] | None) -> tuple[Layer, ...]:
    """Return run.json's layers, in order."""
    if len(entries or ()) > _MAX_LAYERS:
        raise RunDirectoryError(f"{path / RUN_FILE}: more than {_MAX_LAYERS:,} layers")
    try:
        layers = tuple(
            Layer(
                name=str(entry["name"]),
                index=index,
                filters=int(entry["filters"]),
                weight_shape=tuple(map(int, entry["weight_shape"])),
                activation=str(entry["activation"]),
                addition=_bool_or_none(entry.get("addition")),
            )
            for index, entry in enumerate(entries or ())
        )
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise RunDirectoryError(f"{path / RUN_FILE}: unusable layer list: {error}") from None
    names = {layer.name for layer in layers}
    filters = sum(layer.filters for layer in layers)
    if (
        len(names) != len(layers)
        or len(layers) > _MAX_LAYERS
        or any(layer.filters < 1 for layer in layers)
        or filters > _MAX_FILTERS
    ):
        raise RunDirectoryError(f"{path / RUN_FILE}: unusable layer list")
    return layers


def _bool_or_none(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise TypeError(f"addition is {value!r:.20}")


def read_metrics(data: bytes, path: Path) -> "pd.DataFrame":
    """Return metrics.csv, those columns that reports calculate with being numbers.

    Raises RunDirectoryError, naming the file.
    """
    import pandas as pd
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    if data.partition(b"\n")[0].count(b",") >= MAX_METRICS:
        raise RunDirectoryError(f"{path}: has more than {MAX_METRICS:,} columns")
    try:
        table = pd.read_csv(io.BytesIO(data))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()  # resumed from before the end of the first epoch
    except (ValueError, OSError, OverflowError) as error:
        raise RunDirectoryError(f"{path}: damaged or unreadable: {error}") from None
    for name in METRICS:
        if name not in table:
            continue
        column = table[name]
        if column.isna().all():
            table[name] = math.nan
        elif not is_numeric_dtype(column) or is_bool_dtype(column):
            raise RunDirectoryError(f"{path}: column {name} is not one of numbers")
    if "epoch" not in table:  # as somebody's own loop may log them
        table.insert(0, "epoch", range(len(table)))
    if not table["epoch"].between(0, MAX_COUNT).all():
        raise RunDirectoryError(f"{path}: column epoch does not count epochs")
    return table


MAX_METRICS = 1_000
METRICS = (
    "epoch",
    "iteration",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "images_per_second",
)
"""The columns that reports calculate with."""


def is_locked(path: Path) -> bool:
    """Whether a process writes here; where the file system cannot tell, it is taken to."""
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def check_columns(table: pa.Table, folder: Path) -> None:
    """Raise unless every column is one that a trace has."""
    if len(set(table.column_names)) < table.num_columns:
        raise RunDirectoryError(f"{folder}: a part has the same column twice")
    for field in table.schema:
        nested = pa.types.is_fixed_size_list(field.type)
        kind = field.type.value_type if nested else field.type
        column = table[field.name]
        flat = column.combine_chunks().flatten() if nested else column
        numeric = pa.types.is_floating(kind) or pa.types.is_int32(kind) or pa.types.is_int64(kind)
        if not numeric or column.null_count or flat.null_count:
            raise RunDirectoryError(f"{folder}: column {field.name} is not one of numbers")
    if "iteration" not in table.column_names or not pa.types.is_int64(table["iteration"].type):
        raise RunDirectoryError(f"{folder}: a part has no column 'iteration'")


def read_snapshots(paths: Iterable[Path], layers: Sequence[Layer]) -> tuple[FeatureMaps, ...]:
    """Return the snapshots in these files, by iteration and then as the layers are ordered.

    All of them have to fit in memory.
    """
    snapshots: dict[tuple[int, str], FeatureMaps] = {}
    left = storage.memory_share()
    for path in paths:
        try:
            found = _decode_feature_maps(path, min(left, MAX_MAPS_BYTES))
        except FileNotFoundError:
            raise
        except _UNREADABLE as error:
            raise RunDirectoryError(f"{path}: damaged or unreadable: {error}") from None
        if (found.iteration, found.layer) in snapshots:
            raise RunDirectoryError(f"{path}: another snapshot is of the same iteration and layer")
        snapshots[found.iteration, found.layer] = found
        left -= found.maps.nbytes + found.images.nbytes
    order = {layer.name: layer.index for layer in layers}
    return tuple(
        sorted(
            snapshots.values(),
            key=lambda each: (each.iteration, order.get(each.layer, len(order)), each.layer),
        )
    )


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    OverflowError,
    NotImplementedError,
    SyntaxError,
    RecursionError,
    zlib.error,
    zipfile.BadZipFile,
)
"""What NumPy and zipfile raise for a file that somebody made up."""


def _decode_feature_maps(path: Path, limit: int) -> FeatureMaps:
    match = FEATURE_MAPS_NAME.fullmatch(path.name)
    data = storage.read(path, MAX_MAPS_BYTES)
    if match is None or storage.fingerprint(data) != match[2]:
        raise ValueError("its content is not what was written")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        _check_npz(file, limit)
        maps = FeatureMaps(
            iteration=int(file["iteration"]),
            layer=str(file["layer"]),
            maps=file["maps"],
            images=file["images"],
            labels=tuple(str(label) for label in file["labels"]),
        )
    count = len(maps.labels)
    shapes = maps.maps.ndim == maps.images.ndim == 4 and maps.images.shape[1] == 3
    if not shapes or len(maps.maps) != count or len(maps.images) != count:
        raise ValueError("maps, images and labels do not belong together")
    if maps.maps.dtype != np.float32 or maps.images.dtype != np.uint8:
        raise ValueError("not float32 maps of uint8 images")
    if maps.iteration != int(match[1]) or min(*maps.maps.shape, *maps.images.shape) < 1:
        raise ValueError("there is nothing in it, or it is of another iteration than its name says")
    return maps


def _check_npz(file: Any, limit: int) -> None:
    """Raise ValueError for an array that says it is larger than its bytes, or for too many."""
    for entry in file.zip.infolist():
        limit -= entry.file_size
        if limit < 0:
            raise ValueError(f"{entry.filename} says it has {entry.file_size:,} bytes; not read")
        with file.zip.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = reader(stream)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} says it has shape {shape}")
