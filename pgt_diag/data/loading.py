"""Batches from worker processes that outlive epochs, and leave signals to the main process."""

import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pgt_diag.data.base import BadImage
from pgt_diag.errors import DataError
from pgt_diag.machine import usable_cpus

Sample = tuple[Any, Tensor, Iterable[BadImage]]
"""Images, targets and the bad images that were replaced: of one image or of a batch."""

Load = Callable[[int | None, int], Sample]
Join = Callable[[tuple[Any, ...]], Any]

_MOST_WORKERS = 16

Request = tuple[int | None, list[int]]
"""What makes a batch: the epoch (None: test images) and the images' indices."""


class BatchLoader:
    """Makes batches in `workers` processes (0: in this one), always in the order asked for.

    `load(epoch, index)` makes one sample, and `join` the images of a batch from those of its
    samples; they have to be picklable and to depend on nothing else. By default there is a process
    for each CPU that this one may use, shared with those that train beside it, and at most 16.
    Processes are started for the first batches and kept for the next epoch. When batches are
    abandoned half-way their processes end at once.
    """

    def __init__(
        self, load: Load, workers: int | None, *, join: Join = torch.stack, pin_memory: bool
    ) -> None:
        self._load = load
        self._join = join
        self.workers = _default_workers() if workers is None else workers
        self._pin_memory = pin_memory
        self._idle: _Pool | None = None

    def batches(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield a batch for each request.

        Raises DataError for an image that cannot be read, and when a process is killed.
        """
        # Batches may be asked for while others are still being made: those have their own pool.
        pool, self._idle = self._idle, None
        pool = pool or _Pool(self._load, self._join, self.workers, pin_memory=self._pin_memory)
        finished = False
        try:
            yield from pool.batches(requests)
            finished = True
        finally:
            if finished and self._idle is None:
                self._idle = pool
            else:
                pool.stop()

    def close(self) -> None:
        """End the processes that wait for an epoch."""
        pool, self._idle = self._idle, None
        if pool is not None:
            pool.stop()


def _default_workers() -> int:
    # More than the CPUs only get in each other's way, and in that of training.
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, usable_cpus() // beside))


class _Pool:
    """One torch loader and its processes."""

    def __init__(self, load: Load, join: Join, workers: int, *, pin_memory: bool) -> None:
        self._requests = _Requests()
        self._stopped = RawValue(ctypes.c_bool, False)
        self._started = False
        self._loader: DataLoader[Any] | None = DataLoader(
            _Batches(load, join, self._stopped),
            batch_size=None,  # a request makes a whole batch
            sampler=self._requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # without one, the loader draws from the global generator
        )

    def batches(self, requests: Iterable[Request]) -> Iterator[Sample]:
        self._requests.content = requests
        try:
            # No variable for the iterator: a traceback would keep it, and so the processes, alive.
            for batch in self._iterator():
                if isinstance(batch, _Failure):
                    raise DataError(batch.reason)
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            detail = " ".join(str(error).split())
            raise DataError(f"an image loading process died (out of memory?): {detail}") from None

    def _iterator(self) -> Iterator[Any]:
        assert self._loader is not None
        if self._started:
            return iter(self._loader)
        self._started = True
        with _signals_held():
            return iter(self._loader)

    def stop(self) -> None:
        self._stopped.value = True
        self._loader = None


class _Requests:
    """The requests of the next epoch: a loader keeps its sampler for life."""

    content: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.content)


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way out of a worker, which would bury the exception in a traceback."""

    reason: str


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """What every process has a copy of; `stopped` is shared between them."""

    load: Load
    join: Join
    stopped: Any

    def __getitem__(self, request: Request) -> Sample | _Failure:
        epoch, indices = request
        samples = []
        for index in indices:
            if self.stopped.value:  # a large batch takes seconds, and the main process waits
                return _Failure("stopped")
            try:
                samples.append(self.load(epoch, index))
            except DataError as error:
                return _Failure(str(error))
        images, targets, bad = zip(*samples, strict=True)
        return self.join(images), torch.stack(targets), [each for some in bad for each in some]


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals from processes that have just been forked and have no say in them yet."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """Go on when a terminal or Slurm signals all processes: the main one finishes its iteration.

    SIGTERM cannot be ignored outright: it is also how the main process, and Python at exit, end a
    worker. So, as torch's own handler does, it is obeyed when it comes from the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
