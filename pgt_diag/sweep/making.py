"""Making a sweep's rows: one of them, in whatever process, and all of them in this one."""

import contextlib
import fcntl
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pgt_diag import storage, training
from pgt_diag.config import RESUMABLE_WITH, DatasetName, Decode, RunConfig
from pgt_diag.data import fetch_data, load_data
from pgt_diag.data.changes import check_description, check_training_set, data_changes
from pgt_diag.directory import what_is_left
from pgt_diag.errors import (
    DataError,
    NoSpaceError,
    PgtDiagError,
    RunDirectoryError,
    storage_error,
)
from pgt_diag.progress import Listener
from pgt_diag.reading import is_locked
from pgt_diag.resuming import ResumePoint, resume_point
from pgt_diag.run import Run, load_run, runs_in
from pgt_diag.sweep.grid import Row
from pgt_diag.sweep.processes import train_in_processes
from pgt_diag.sweep.status import RowStatus, State, status_of

FAILED_FOLDER = "failed"
"""Where in the sweep's directory a failed run goes that is retried from its start."""


class SweepListener:
    """Hears how a sweep goes. The library prints nothing; override what you want to show."""

    def row_listener(self, row: Row) -> Listener:
        """Before a row: who hears how its training goes."""
        return Listener()

    def changed(self, status: RowStatus) -> None:
        """When a row has another state, or more iterations."""


def make_row(
    row: Row,
    folder: Path,
    *,
    processes: int = 1,
    retry_failed: bool = False,
    accept_changed_data: bool = False,
    listener: Listener | None = None,
    look: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> RowStatus:
    """Make a row's run, go on with it, or leave it as it is; return how it stands then.

    processes: how many train it together, if not this one alone; `listener` then hears nothing,
    and `look` is called now and then.

    A finished one is left, one that another process makes as well (RUNNING), and a failed one
    unless `retry_failed`. Its data has to be that of the folder's other runs on the same data set,
    unless `accept_changed_data`. What goes wrong with this run alone is told in the status.

    Raises DataError and NoSpaceError, which no other row would escape, and KeyboardInterrupt.
    """
    storage.make_folder(folder)
    with _claimed(row, folder) as ours:
        status = status_of(row, folder)
        if not ours or status.state in (State.RUNNING, State.FINISHED):
            return status if ours else replace(status, state=State.RUNNING)
        if status.state is State.FAILED and not retry_failed:
            return status
        directory = folder / row.name
        try:
            check_data(row, folder, accept=accept_changed_data)
            with _own_settings():
                point = starting_point(directory, retry_failed=retry_failed)
                if processes > 1:
                    train_in_processes(
                        row,
                        directory,
                        processes,
                        accept_changed_data=accept_changed_data,
                        look=look,
                        stop=stop,
                    )
                else:
                    training.train(
                        _config(row, point),
                        directory,
                        listener=listener,
                        resume=point,
                        accept_changed_data=accept_changed_data,
                        stop=stop,
                        command=row.command(directory),
                    )
        except (DataError, NoSpaceError):
            raise
        except Exception as error:  # out of memory, a damaged disk: the next row may do better
            status = status_of(row, folder)
            if status.state in (State.RUNNING, State.FINISHED):  # `pgt-diag train` was faster
                return status
            return replace(status, state=State.FAILED, message=_one_line(error))
        return status_of(row, folder)


def make_rows(
    rows: Sequence[Row],
    folder: Path,
    *,
    processes: int = 1,
    retry_failed: bool = False,
    accept_changed_data: bool = False,
    listener: SweepListener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[RowStatus]:
    """Make a sweep's rows one after the other, here or in `processes`; return how they stand.

    Rows that another process makes are left to it, and waited for. Raises what `make_row` does.
    """
    listener = listener or SweepListener()
    results: dict[Row, RowStatus] = {}
    while len(results) < len(rows):
        progressed = False
        for row in rows:
            if row in results:
                continue
            if stop():
                raise KeyboardInterrupt
            status = status_of(row, folder)
            if is_to_do(status, retry_failed=retry_failed):
                status = make_row(
                    row,
                    folder,
                    processes=processes,
                    retry_failed=retry_failed,
                    accept_changed_data=accept_changed_data,
                    listener=listener.row_listener(row),
                    look=partial(_tell, row, folder, listener),
                    stop=stop,
                )
            if status.state is State.RUNNING:
                listener.changed(replace(status, message="another process makes it"))
                continue
            listener.changed(status)
            results[row] = status
            progressed = True
        if not progressed:
            time.sleep(_LOOK_SECONDS)
    return [results[row] for row in rows]


def check_data(row: Row, folder: Path, *, accept: bool, elsewhere: bool = False) -> None:
    """Compare a row's data with that of the runs in `folder` on the same data set.

    elsewhere: the row is made on other machines, and its data need not be on this one.

    Raises DataError for another training set, unless that is accepted: rows are to be compared, and
    those that are finished would stay. Its own run is left to training, which knows more of it.
    """
    earlier = [] if accept else [run for run in _runs_on(row, folder) if run.path.name != row.name]
    if not earlier:
        return
    try:
        data = load_data(replace(row.config, decode=Decode.CPU, batch_size=1))
    except DataError:
        if elsewhere:
            return
        raise
    for run in earlier:
        check_training_set(
            data_changes(data, run.info["data"]), f"the run in {run.path}", accept=False
        )


def _runs_on(row: Row, folder: Path) -> Iterator[Run]:
    """Yield the folder's runs on the same data set as a row, as far as they tell."""
    for path in runs_in(folder):
        with contextlib.suppress(PgtDiagError, AttributeError, KeyError, TypeError, ValueError):
            run = load_run(path)
            check_description(run.info["data"])
            if run.config is not None and _data_set(run.config) == _data_set(row.config):
                yield run


def _data_set(config: RunConfig) -> tuple[Any, ...]:
    if config.dataset is not DatasetName.SYNTHETIC:
        return (config.dataset,)
    return config.image_size, config.synthetic_images, config.synthetic_classes


def fetch_all(rows: Sequence[Row]) -> None:
    """Fetch each of the rows' data sets once; see `data.fetch_data`."""
    for config in {(r.config.dataset, r.config.data): r.config for r in rows}.values():
        fetch_data(config)


def _tell(row: Row, folder: Path, listener: SweepListener) -> None:
    listener.changed(replace(status_of(row, folder), state=State.RUNNING))


def is_to_do(status: RowStatus, *, retry_failed: bool) -> bool:
    """Whether a sweep has to make this row, now that nobody else does."""
    if status.state is State.FAILED:
        return retry_failed
    return status.state in (State.NEW, State.INTERRUPTED)


def starting_point(directory: Path, *, retry_failed: bool) -> ResumePoint | None:
    """Return where a row's run goes on, None for its start.

    With `retry_failed`, a run from which nothing can go on is moved into FAILED_FOLDER; raises
    RunDirectoryError without.
    """
    if not what_is_left(directory):
        return None
    try:
        return resume_point(directory)
    except RunDirectoryError:
        if not retry_failed or is_locked(directory):
            raise
    folder = directory.parent / FAILED_FOLDER
    storage.make_folder(folder)
    number = len(list(folder.glob(f"{directory.name}-*"))) + 1
    directory.rename(folder / f"{directory.name}-{number}")
    return None


_CLAIMS_FILE = ".rows.lock"
_LOOK_SECONDS = 1.0


@contextlib.contextmanager
def _claimed(row: Row, folder: Path) -> Iterator[bool]:
    """Hold a row against other sweeps; yield whether nobody else does.

    A run's own lock is taken only when training begins: two sweeps that found the same row to do
    would both make it, one after the other. One byte of one file for each row.
    """
    path = folder / _CLAIMS_FILE
    place = int(row.name.rpartition("-")[2], 16)
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(path, error) from None
    try:
        yield _lock_byte(file, place, path)
    finally:
        os.close(file)


def _lock_byte(file: int, place: int, path: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # a file system without locks
        raise storage_error(path, error) from None
    return True


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Put back what a run sets for the whole process, and free what it took."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _config(row: Row, point: ResumePoint | None) -> RunConfig:
    if point is None:
        return row.config
    return replace(point.config, **{key: getattr(row.config, key) for key in RESUMABLE_WITH})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
