"""Whether every file of a run directory is what was written, and where the run would go on."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pgt_diag import storage, trace
from pgt_diag.directory import FEATURE_MAPS_FOLDER, LOCK_FILE, METRICS_FILE, RUN_FILE
from pgt_diag.errors import PgtDiagError, RunDirectoryError
from pgt_diag.reading import digests_of, is_locked
from pgt_diag.resuming import resume_point
from pgt_diag.run import Run, load_run
from pgt_diag.text import printable

_FINGERPRINT = re.compile(r"[a-z]+(?:-\d{12})*-([0-9a-f]{16})\.(?:parquet|npz|csv|json)")
_SHA256 = re.compile(r"checkpoint-\d{12}-([0-9a-f]{64})\.pt")
_VOUCHED_FOR = (METRICS_FILE, trace.EVENTS_FILE, trace.BRIEF_SPELLS_FILE)


@dataclass(frozen=True)
class Check:
    """What was found in one run directory; every problem and note names its file."""

    path: Path
    status: str | None
    iterations: int | None
    files: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    checkpoint: Path | None
    """What an unfinished run would go on from."""


def check_run(path: Path) -> Check:
    """Read every file of the run directory `path`, and change nothing.

    Raises RunDirectoryError when there is no run directory.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: no such directory")
    problems, notes = [], []
    run: Run | None = None
    try:
        run = load_run(path)
    except RunDirectoryError as error:
        problems.append(str(error))
    files = sorted(_files(path))
    for file in files:
        try:
            note = _check_file(path, file, run)
        except FileNotFoundError:
            continue  # the run goes on, and has merged it away
        except RunDirectoryError as error:
            problems.append(str(error))
        else:
            notes += [f"{file}: {note}"] if note else []
    problems += [problem for problem in _check_content(run) if problem not in problems]
    checkpoint = None
    if run is None or run.status in ("interrupted", "failed"):
        try:
            checkpoint = resume_point(path).checkpoint
        except PgtDiagError as error:
            notes.append(str(error))
    return Check(
        path=path,
        status=run.status if run else None,
        iterations=_iterations(run),
        files=len(files),
        problems=tuple(problems),
        notes=tuple(notes),
        checkpoint=checkpoint,
    )


def _files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            yield from _files(entry)
        else:
            yield entry


def _check_file(directory: Path, file: Path, run: Run | None) -> str | None:
    """Raise RunDirectoryError for a damaged file; return what is odd about it otherwise."""
    name = file.name
    if file.is_symlink():
        raise RunDirectoryError(f"{file}: is a link; a run directory holds none")
    if match := _SHA256.fullmatch(name):
        with storage.opened(file, storage.MAX_CHECKPOINT_BYTES) as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != match[1]:
                raise storage.damaged(file)
    elif match := _FINGERPRINT.fullmatch(name):
        storage.verify(file, (match[1],))
    elif file.parent == directory and name in _VOUCHED_FOR:
        digests = digests_of(run.info, name) if run else ()
        if not digests:
            return "is not sealed: the run was killed while it was written; it is not used"
        if not is_locked(directory):
            storage.verify(file, digests)
    elif file.parent != directory or name not in (RUN_FILE, LOCK_FILE):
        unfinished = name.startswith(".") and name.endswith(".tmp")
        return "was being written at a kill" if unfinished else "does not belong to a run"
    elif name == LOCK_FILE and file.stat().st_size:
        return "has content, and should have none"
    return None


def _check_content(run: Run | None) -> list[str]:
    """Return why what the run recorded cannot be read as a whole."""
    if run is None:
        return []
    problems = []
    readings: tuple[Callable[[], object], ...] = (
        lambda: run.metrics,
        lambda: run.iterations,
        lambda: _read_norms(run),
        lambda: run.events,
        lambda: run.brief_spells,
        lambda: run.feature_maps,
    )
    for read in readings:
        try:
            read()
        except RunDirectoryError as error:
            problems.append(str(error))
    folder = run.path / FEATURE_MAPS_FOLDER
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in run.info.get("snapshots") or () if name not in there]
    if run.status != "running":
        problems += [f"{folder}: {printable(str(name), 100)} is missing" for name in missing]
    count, sealed = _iterations(run), run.info.get("iterations")
    if sealed is not None and run.status != "running" and count is not None and count != sealed:
        folder = run.path / trace.ITERATIONS_FOLDER
        problems.append(f"{folder}: {count:,} of {sealed:,} iterations are there")
    return problems


def _read_norms(run: Run) -> None:
    for layer in run.layers:
        run.weight_norms(layer.name)


def _iterations(run: Run | None) -> int | None:
    try:
        return run.iteration_count if run else None
    except RunDirectoryError:
        return None
