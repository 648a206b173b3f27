"""Has OpenMP's threads sleep, instead of spin, while other processes need the CPUs.

At every operation of a network the threads of GNU's OpenMP, which torch brings along, wait for each
other: for some milliseconds they spin, since to sleep and be woken takes longer than most waits.
Beside a busy neighbour a thread that spins takes the CPU from the one that it waits for, and
training takes twice as long. Which is better can change at any time, and the environment decides it
for good (OMP_WAIT_POLICY, GOMP_SPINCOUNT). But where there are more OpenMP threads than CPUs,
libgomp spins for a few microseconds only, whatever they do: a second team that sleeps is enough.

Source: GCC's manual of libgomp, "GOMP_SPINCOUNT"; `tests/benchmarks/busy_machine.py` measures it.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

BUSY, IDLE = 0.25, 0.1
"""Spinning ends when our threads wait for a CPU for more than this share of the time, and begins
again below the second. One busy neighbour on two CPUs makes it 0.65, a machine of one's own 0.02 to
0.06: the trace's writer is a neighbour too."""
_CALM_SAMPLES = 3
"""So many calm samples in a row, since a neighbour may only have paused."""
_SECONDS = 1.0
_THREADS = Path("/proc/self/task")
_CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def sharing_cpus() -> Iterator[threading.Event]:
    """Watch, in a thread, whether others need the CPUs; let OpenMP's threads spin while not.

    Yields what is set, once, when others are found to need them. Threads wait as ever where the
    environment says how, where there is one, and where OpenMP is another one than GNU's; nothing is
    watched where the system does not say how long threads wait for a CPU.
    """
    found, ended = threading.Event(), threading.Event()
    if not (_THREADS / str(threading.get_native_id()) / "schedstat").exists():
        yield found
        return
    watching = partial(_watch, ended, found, switch=_can_be_switched())
    watch = threading.Thread(target=watching, daemon=True, name="pgt-diag-cpus")
    watch.start()
    try:
        yield found
    finally:
        ended.set()
        watch.join()


class Contention:
    """Decides whether others need the CPUs, from how long our threads have waited for one."""

    def __init__(self) -> None:
        self.busy = False
        self._calm = 0

    def update(self, share: float) -> bool:
        """Take the share of a CPU's time waited for since the last call; return whether busy."""
        self._calm = self._calm + 1 if share < IDLE else 0
        if share > BUSY:
            self.busy = True
        elif self._calm >= _CALM_SAMPLES:
            self.busy = False
        return self.busy


class SleepingTeam:
    """A second team of OpenMP threads that does nothing: while it is there, none spins for long."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        made = threading.Event()
        self._thread = threading.Thread(
            target=self._make, args=(made,), daemon=True, name="pgt-diag-team"
        )
        self._thread.start()
        made.wait()

    def end(self) -> None:
        """Let the other threads spin again."""
        self._ended.set()
        self._thread.join()

    def _make(self, made: threading.Event) -> None:
        # Large enough for torch to share it out; OpenMP keeps the threads until this one ends.
        torch.ones(1 << 20).neg_()
        made.set()
        self._ended.wait()


def waited_seconds() -> float:
    """Return for how long this process's threads, those that live, have waited for a CPU."""
    waited = 0
    for thread in _THREADS.iterdir():
        try:
            waited += int((thread / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # it has ended
            continue
    return waited / 1e9


def _can_be_switched() -> bool:
    if any(name in os.environ for name in _CHOSEN_BY_USER) or torch.get_num_threads() == 1:
        return False
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


def _watch(ended: threading.Event, found: threading.Event, *, switch: bool) -> None:
    contention, team, known = Contention(), None, False
    waited, at = waited_seconds(), time.monotonic()
    try:
        while not ended.wait(_SECONDS):
            waited_before, before = waited, at
            waited, at = waited_seconds(), time.monotonic()
            busy = contention.update(max(0.0, waited - waited_before) / (at - before))
            if busy and not known:
                known = True
                found.set()
            if busy and switch and team is None:
                team = SleepingTeam()
            elif not busy and team is not None:
                team.end()
                team = None
    finally:
        if team is not None:
            team.end()
