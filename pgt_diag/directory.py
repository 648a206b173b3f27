"""The run directory, as a recorder creates and writes it, but for the trace."""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pgt_diag import storage, trace
from pgt_diag.errors import RunDirectoryError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
LOCK_FILE = ".lock"
FEATURE_MAPS_FOLDER = "feature_maps"
FEATURE_MAPS_NAME = re.compile(r"iteration-(\d{12})-([0-9a-f]{16})\.npz")
CHECKPOINTS_FOLDER = "checkpoints"
SET_ASIDE_FOLDER = "set-aside"
MAX_RUN_FILE_BYTES, MAX_METRICS_BYTES = 1 << 24, 1 << 26
_TRACE_FOLDERS = (
    trace.NORMS_FOLDER,
    trace.ITERATIONS_FOLDER,
    trace.EVENTS_FOLDER,
    trace.BRIEF_SPELLS_FOLDER,
)
_OWN_FOLDERS = (*_TRACE_FOLDERS, FEATURE_MAPS_FOLDER, CHECKPOINTS_FOLDER, SET_ASIDE_FOLDER)
_SEALED_FILES = (trace.EVENTS_FILE, trace.BRIEF_SPELLS_FILE)
_OWN_FILES = (METRICS_FILE, *_SEALED_FILES, RUN_FILE)  # what makes it a run is deleted last
_LEFT_OVER = (LOCK_FILE, *(f".{name}.tmp" for name in _OWN_FILES))
"""What a kill leaves where a run was about to be created."""
_LOCK_ATTEMPTS = 10


def now() -> str:
    """Return the time, in UTC, as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_claims: dict[Path, int] = {}
"""Locks taken by `claimed`, to be taken over by the directory's writer in this process."""


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a run that this process is about to go on with, where that can be done.

    To load torch and the data takes many seconds, in which readers would take the run for dead.
    """
    path = path.resolve()
    with contextlib.suppress(OSError):
        lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody else writes it, which is told later
            os.close(lock)
        else:
            _claims[path] = lock
    try:
        yield
    finally:
        if (claim := _claims.pop(path, None)) is not None:
            os.close(claim)


def is_claimed(path: Path) -> bool:
    """Whether this process has claimed a run that it does not yet write."""
    return path.resolve() in _claims


class RunDirectory:
    """The writing side of a run directory, but for the trace, which its encoder writes.

    run.json holds the fingerprints of the files that keep their name while their content changes,
    and its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._info: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        self._metrics = ""
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, *, force: bool = False, info: dict[str, Any] | None = None) -> Self:
        """Create the directory; with `force`, delete the run that it holds, and only that.

        info: run.json's first entries, written at once: at a kill it is no run, or has them.

        Raises RunDirectoryError when it holds a run, or anything else, already. After any error
        nobody is kept out.
        """
        check_vacant(path, force=force)
        directory = cls(path)
        try:
            storage.make_folder(path)
            storage.check_no_links(path)
            directory.lock()
            check_vacant(path, force=force)  # another process may have made a run in between
            for name in _OWN_FOLDERS:
                if (path / name).exists():
                    shutil.rmtree(path / name)
            for name in _OWN_FILES:
                (path / name).unlink(missing_ok=True)
            directory.update({"created": now(), **(info or {})})
        except BaseException as error:
            directory.unlock()
            if isinstance(error, OSError):
                raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from None
            raise
        return directory

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """Lock the directory of a run that goes on; `restore` makes it fit a checkpoint.

        Raises RunDirectoryError when it is being written, or holds a link.
        """
        storage.check_no_links(path)
        directory = cls(path)
        try:
            directory.lock()
        except OSError as error:
            raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from None
        return directory

    @property
    def planned_iterations(self) -> int | None:
        """How long the run is to be, where run.json says so."""
        planned = self._info.get("planned_iterations")
        return planned if isinstance(planned, int) else None

    def state_dict(self) -> dict[str, Any]:
        """Return run.json's entries as JSON, and metrics.csv."""
        return {"info": json.dumps(self._info), "metrics": self._metrics}

    def restore(self, state: dict[str, Any], ends: dict[str, int], iterations: int) -> None:
        """Go on from a `state_dict`: set aside whatever was recorded after it.

        ends: by trace folder, the first row key that is not kept; iterations: likewise for the
        feature maps. Done again after a kill in the middle, it does what is left to do.
        """
        aside = self._new_aside()
        self._info = json.loads(state["info"])
        self._metrics = str(state["metrics"])
        run_file, metrics_file = self.path / RUN_FILE, self.path / METRICS_FILE
        found = _content(metrics_file, MAX_METRICS_BYTES)
        # run.json vouches for a metrics.csv that is there, whichever of the two it is at a kill.
        digests = [self._metrics_fingerprint(), storage.fingerprint(found)]
        if not _is_sealed(run_file):
            _keep(_content(run_file, MAX_RUN_FILE_BYTES), aside, "run", ".json")
        end = f"iteration-{iterations:012d}"
        snapshots = [name for name in self._info.get("snapshots", ()) if name < end]
        self.update(
            {
                "status": "running",
                "message": None,
                "digests": {METRICS_FILE: digests},
                "snapshots": snapshots,
            }
        )
        if found != self._metrics.encode():
            _keep(found, aside, "metrics", ".csv")
            storage.write(metrics_file, self._metrics.encode())
        self._vouch_for_metrics()
        for name in _SEALED_FILES:
            if (self.path / name).exists():
                storage.remove(self.path / name)  # made from parts that are still there
        # In the order opposite to writing: at a kill no event is of an iteration that is not there.
        for name in reversed(_TRACE_FOLDERS):
            trace.rewind(self.path / name, ends[name], aside / name)
        for path in sorted((self.path / FEATURE_MAPS_FOLDER).glob("iteration-*.npz")):
            match = FEATURE_MAPS_NAME.fullmatch(path.name)
            if match and int(match[1]) >= iterations:
                storage.move(path, aside / FEATURE_MAPS_FOLDER)
        for path in self.path.glob("**/.*.tmp"):
            storage.remove(path)

    def _new_aside(self) -> Path:
        folder = self.path / SET_ASIDE_FOLDER
        number = len(list(folder.glob("resume-*")))
        return folder / f"resume-{number + 1:04d}"

    def update(self, values: dict[str, Any]) -> None:
        """Merge `values` into run.json, atomically."""
        self._info |= values
        data = seal_info(self._info)
        if len(data) > MAX_RUN_FILE_BYTES:
            largest = max(self._info, key=lambda key: len(json.dumps(self._info[key], default=str)))
            raise RunDirectoryError(
                f"{self.path / RUN_FILE}: would have {len(data):,} bytes, most of them {largest}; "
                f"no more than {MAX_RUN_FILE_BYTES:,} are read"
            )
        storage.write(self.path / RUN_FILE, data)

    def lock(self) -> None:
        """Keep other writers out until `finish`, or until this process ends."""
        if (claim := _claims.pop(self.path, None)) is not None:
            self._lock = claim
            return
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        self._lock = os.open(self.path / LOCK_FILE, flags, 0o644)
        taken = False
        try:
            taken = _take(self._lock)
        finally:
            if not taken:
                self.unlock()
        if not taken:
            raise RunDirectoryError(
                f"{self.path}: is being written by another run; name another directory"
            )

    def unlock(self) -> None:
        """Let other writers in; further calls do nothing."""
        file, self._lock = self._lock, None
        if file is not None:
            os.close(file)

    def finish(
        self, status: str, message: str | None = None, sealed: dict[str, bytes] | None = None
    ) -> None:
        """Record how the run ended, with the sealed files' content, and let go of it."""
        sealed = sealed or {}
        try:
            for name, data in sealed.items():
                storage.write(self.path / name, data)
            digests = {name: [storage.fingerprint(data)] for name, data in sealed.items()}
            self.update(
                {
                    "status": status,
                    "message": message,
                    "ended": now(),
                    "digests": {**self._info.get("digests", {}), **digests},
                }
            )
            if status == "finished":
                for name in (trace.EVENTS_FOLDER, trace.BRIEF_SPELLS_FOLDER):
                    if (self.path / name).exists():
                        shutil.rmtree(self.path / name)
        finally:
            self.unlock()

    @property
    def metrics_columns(self) -> list[str]:
        """The columns of metrics.csv; none before the first row."""
        return next(csv.reader(io.StringIO(self._metrics)), [])

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Append an epoch's row to metrics.csv; the first row's keys are the columns."""
        buffer = io.StringIO()
        columns = self.metrics_columns or list(values)
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        if not self._metrics:
            writer.writeheader()
        writer.writerow(values)
        before = self._metrics_fingerprint()
        self._metrics += buffer.getvalue()
        # The new content's fingerprint first: at a kill in between, the old content is still right.
        self._vouch_for_metrics(before)
        storage.write(self.path / METRICS_FILE, self._metrics.encode())
        # And no longer than that: a file cut to it would pass for whole.
        self._vouch_for_metrics()

    def _vouch_for_metrics(self, *also: str) -> None:
        digests = {METRICS_FILE: [self._metrics_fingerprint(), *also]}
        self.update({"digests": {**(self._info.get("digests") or {}), **digests}})

    def _metrics_fingerprint(self) -> str:
        return storage.fingerprint(self._metrics.encode())

    def write_feature_maps(
        self, iteration: int, layer: str, maps: "Tensor", images: "Tensor", labels: list[str]
    ) -> None:
        """Store one snapshot: maps (n, C, H, W) float, images (n, 3, H', W') uint8."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            iteration=np.int64(iteration),
            layer=np.asarray(layer),
            maps=maps.float().cpu().numpy(),
            images=images.cpu().numpy(),
            labels=np.asarray(labels, dtype=np.str_),
        )
        data = buffer.getvalue()
        folder = _made(self.path / FEATURE_MAPS_FOLDER)
        name = f"iteration-{iteration:012d}-{storage.fingerprint(data)}.npz"
        storage.write(folder / name, data)
        self.update({"snapshots": sorted({*self._info.get("snapshots", ()), name})})


def seal_info(info: dict[str, Any]) -> bytes:
    """Return run.json's content: `info`, and the SHA-256 of it, so that damage is found."""
    plain = json.loads(json.dumps(info, default=str))
    plain.pop("sha256", None)
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    plain["sha256"] = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def open_info(data: bytes) -> dict[str, Any]:
    """Return what `seal_info` sealed; ValueError when the content is not what was written."""
    info = json.loads(data)
    if not isinstance(info, dict):
        raise TypeError("no JSON object")
    digest = info.pop("sha256", None)
    if seal_info(info) != data:
        was = "its checksum differs" if digest else "it has no checksum"
        raise ValueError(f"its content is not what was written ({was})")
    return info


def what_is_left(path: Path) -> list[str]:
    """Return which of a run's own folders and files lie in `path`: any of them makes it a run."""
    return [name for name in (*_OWN_FOLDERS, *_OWN_FILES) if _is_there(path / name)]


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False  # and not where it cannot be seen: no run is to be overlooked
    return True


def check_vacant(path: Path, *, force: bool = False) -> None:
    """Raise RunDirectoryError unless a run can be created at `path`."""
    try:
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path}: is a file; name a directory for the run")
        if not path.exists() or all(entry.name in _LEFT_OVER for entry in path.iterdir()):
            return
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be used: {error.strerror}") from None
    if not (path / RUN_FILE).exists():
        raise RunDirectoryError(f"{path}: holds other files; name an empty or new directory")
    if not force:
        raise RunDirectoryError(
            f"{path}: already holds a run; name another directory, go on with `resume=...`, or "
            "replace it with `force=True`"
        )


def _take(lock: int) -> bool:
    """Lock an open file against other writers; return whether nobody else has."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A reader holds it for an instant to see whether the run goes on.
            time.sleep(0.01 * attempt)
        else:
            return True
    return False


def _is_sealed(path: Path) -> bool:
    try:
        open_info(storage.read(path, MAX_RUN_FILE_BYTES))
    except (ValueError, TypeError, RunDirectoryError):
        return False
    return True


def _content(path: Path, limit: int) -> bytes:
    return storage.read(path, limit) if path.exists() else b""


def _keep(data: bytes, folder: Path, stem: str, suffix: str) -> None:
    if data:
        storage.write(_made(folder) / f"{stem}-{storage.fingerprint(data)}{suffix}", data)


def _made(folder: Path) -> Path:
    storage.make_folder(folder)
    return folder
