"""The run directory, as a recorder creates and writes it, but for the trace."""

import csv
import fcntl
import io
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pgt_diag import trace
from pgt_diag.errors import RunDirectoryError, storage_error

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
LOCK_FILE = ".lock"
FEATURE_MAPS_FOLDER = "feature_maps"
_OWN_FOLDERS = (
    trace.NORMS_FOLDER,
    trace.ITERATIONS_FOLDER,
    trace.EVENTS_FOLDER,
    FEATURE_MAPS_FOLDER,
)
_OWN_FILES = (RUN_FILE, METRICS_FILE, trace.EVENTS_FILE, trace.BRIEF_SPELLS_FILE)


def now() -> str:
    """Return the time, in UTC, as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """The writing side of a run directory, but for the trace, which its encoder writes."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._info: dict[str, Any] = {}
        self._metrics_columns: list[str] = []

    @classmethod
    def create(cls, path: Path, *, force: bool = False) -> Self:
        """Create the directory; with `force`, delete the run that it holds, and only that.

        Raises RunDirectoryError when it holds a run, or anything else, already.
        """
        check_vacant(path, force=force)
        try:
            path.mkdir(parents=True, exist_ok=True)
            directory = cls(path)
            directory.lock()
            for name in _OWN_FOLDERS:
                if (path / name).exists():
                    shutil.rmtree(path / name)
            for name in _OWN_FILES:
                (path / name).unlink(missing_ok=True)
            directory.update({"schema_version": SCHEMA_VERSION, "created": now()})
        except OSError as error:
            raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from None
        return directory

    def update(self, values: dict[str, Any]) -> None:
        """Merge `values` into run.json, atomically."""
        self._info |= values
        text = json.dumps(self._info, indent=2, ensure_ascii=False, default=str) + "\n"
        trace.write_atomically(self.path / RUN_FILE, lambda path: _write_text(path, text))

    def lock(self) -> None:
        """Keep other writers out until `finish`, or until this process ends."""
        self._lock = os.open(self.path / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise RunDirectoryError(
                f"{self.path}: is being written by another run; name another directory"
            ) from None

    def finish(self, status: str, message: str | None = None) -> None:
        """Record how the run ended, and let go of the directory."""
        try:
            self.update({"status": status, "message": message, "ended": now()})
        finally:
            os.close(self._lock)

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Append an epoch's row to metrics.csv; the first row's keys are the columns."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._metrics_columns or list(values), lineterminator="\n")
        if not self._metrics_columns:
            self._metrics_columns = list(values)
            writer.writeheader()
        writer.writerow(values)
        path = self.path / METRICS_FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(buffer.getvalue())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(path, error) from error

    def write_feature_maps(
        self, iteration: int, layer: str, maps: "Tensor", images: "Tensor", labels: list[str]
    ) -> None:
        """Store one snapshot: maps (n, C, H, W) float, images (n, 3, H', W') uint8."""
        folder = self.path / FEATURE_MAPS_FOLDER
        folder.mkdir(exist_ok=True)

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(
                    file,
                    iteration=np.int64(iteration),
                    layer=np.asarray(layer),
                    maps=maps.float().cpu().numpy(),
                    images=images.cpu().numpy(),
                    labels=np.asarray(labels),
                )

        trace.write_atomically(folder / f"iteration-{iteration:012d}.npz", write)


def check_vacant(path: Path, *, force: bool = False) -> None:
    """Raise RunDirectoryError unless a run can be created at `path`."""
    try:
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path}: is a file; name a directory for the run")
        if not path.exists() or all(entry.name == LOCK_FILE for entry in path.iterdir()):
            return
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be used: {error.strerror}") from None
    if not (path / RUN_FILE).exists():
        raise RunDirectoryError(f"{path}: holds other files; name an empty or new directory")
    if not force:
        raise RunDirectoryError(
            f"{path}: already holds a run; name another directory, or replace it with --force"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
