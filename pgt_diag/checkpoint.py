"""Checkpoints: written so that a kill never costs the last one, read as a stranger's would be.

`checkpoint-<step>-<sha256>.pt`: the name vouches for the content. A checkpoint is found newest
first, read into memory once, and loaded from the very bytes that were hashed.
"""

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pgt_diag import storage
from pgt_diag.directory import CHECKPOINTS_FOLDER, SET_ASIDE_FOLDER
from pgt_diag.errors import RunDirectoryError

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{12})-([0-9a-f]{64})\.pt")


def save(directory: Path, step: int, state: dict[str, Any], kept: int = KEPT) -> Path:
    """Write a checkpoint after `step` optimizer steps; delete all but the newest `kept`.

    state: tensors, numbers, text, and lists and dicts of these.
    """
    folder = directory / CHECKPOINTS_FOLDER
    storage.make_folder(folder)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = folder / f"checkpoint-{step:012d}-{hashlib.sha256(data).hexdigest()}.pt"
    storage.write(path, data)
    for older in [found for found in found_in(directory) if found != path][kept - 1 :]:
        storage.remove(older)
    return path


def found_in(directory: Path) -> list[Path]:
    """Return the checkpoints of a run directory, damaged or not, newest first."""
    folder = directory / CHECKPOINTS_FOLDER
    storage.check_no_link(folder)
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in paths if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name[:23], path.lstat().st_mtime_ns), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Return what `save` was given, with tensors on the CPU; nothing in it can run code.

    Raises RunDirectoryError, naming the file, when its content is not what was written.
    """
    match = _NAME.fullmatch(path.name)
    data = storage.read(path, storage.MAX_CHECKPOINT_BYTES)
    if match is None or hashlib.sha256(data).hexdigest() != match[2]:
        raise storage.damaged(path)
    try:
        _check_sizes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tensor that is refused right below
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_values(state)
    except Exception as error:  # whatever a made-up file makes the readers raise
        raise RunDirectoryError(f"{path}: is no checkpoint: {error}") from None
    if not isinstance(state, dict):
        raise RunDirectoryError(f"{path}: is no checkpoint of pgt-diag")
    return state


def set_aside_newer(directory: Path, used: Path) -> None:
    """Move the checkpoints that are newer than the `used` one, being damaged, out of the way."""
    found = found_in(directory)
    for path in found[: found.index(used)]:
        storage.move(path, directory / SET_ASIDE_FOLDER / CHECKPOINTS_FOLDER)


def intact(directory: Path) -> Iterator[tuple[Path, dict[str, Any] | RunDirectoryError]]:
    """Yield each checkpoint, newest first, with its state or the error that tells its damage."""
    for path in found_in(directory):
        try:
            yield path, load(path)
        except RunDirectoryError as error:
            yield path, error


def _check_sizes(data: bytes) -> None:
    """Raise ValueError for an archive that unpacks to more than itself."""
    # Anything else torch reads as its older formats, which say sizes of their own.
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it is no archive")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed")
    if sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("its entries say that they are larger than the file")


def _check_values(state: object) -> None:
    """Raise ValueError for a tensor that is larger than its bytes, or any other kind of value.

    A view of one number may say that it has 10^12: whoever copies it would need them all.
    """
    left, seen = [state], set()
    while left:
        value = left.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) not in seen:
                seen.add(id(value))
                left += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError("it has a tensor without plain values")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"it has a tensor that says it has shape {tuple(value.shape)}")
        elif not isinstance(value, int | float | str | None):
            raise ValueError(f"it has a {type(value).__name__}")  # noqa: TRY004
