"""Following a sweep, or any folder of runs: how each of them stands now."""

from dataclasses import dataclass
from pathlib import Path

from pgt_diag.directory import RUN_FILE
from pgt_diag.errors import PgtDiagError
from pgt_diag.reading import is_locked
from pgt_diag.run import runs_in
from pgt_diag.sweep.status import PLAN_FILE, planned_names
from reports.follow import Follower, Snapshot, last_write

IDLE_SECONDS = 120.0
"""A sweep with runs left to make, none of which goes on, has ended after so long without a sign of
life: between two runs it reads its data."""


@dataclass(frozen=True)
class RunNow:
    """One run of a folder: its state, and the run itself where it has been begun and can be read.

    state: a run's status, or `to do`, or `damaged`, with `message` saying how.
    """

    name: str
    state: str
    message: str | None
    snapshot: Snapshot | None


@dataclass(frozen=True)
class SweepSnapshot:
    """A folder of runs at one moment; `seconds_left` is None where nothing tells."""

    name: str
    runs: tuple[RunNow, ...]
    running: bool
    """Whether one goes on, or the sweep is between two."""
    seconds_left: float | None

    @property
    def status(self) -> str:
        """`running`, `finished` when every run is, else `ended`."""
        if self.running:
            return "running"
        return "finished" if self.count("finished") == len(self.runs) else "ended"

    def count(self, state: str) -> int:
        """Return how many runs are in a state."""
        return sum(run.state == state for run in self.runs)


def is_folder_of_runs(path: Path) -> bool:
    """Whether a path is no run itself but a sweep's directory, or holds runs."""
    if (path / RUN_FILE).exists():
        return False
    return (path / PLAN_FILE).exists() or bool(runs_in(path))


class SweepFollower:
    """Looks at a folder of runs again and again; at those that have ended, once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._followers: dict[str, Follower] = {}
        self._ended: dict[str, tuple[int, RunNow]] = {}

    def look(self, now: float) -> SweepSnapshot:
        """Return the runs as they are at `now` (seconds since the epoch, as file times are)."""
        found = [run.name for run in runs_in(self.path)]
        names = list(dict.fromkeys([*planned_names(self.path), *found]))
        runs = tuple(self._look_at(name, now) for name in names)
        goes_on = any(run.state == "running" for run in runs)
        return SweepSnapshot(
            name=self.path.resolve().name,
            runs=runs,
            running=goes_on or (any(map(_is_left, runs)) and self._between_runs(names, now)),
            seconds_left=_seconds_left(runs) if goes_on else None,
        )

    def _look_at(self, name: str, now: float) -> RunNow:
        path = self.path / name
        if not (path / RUN_FILE).exists():
            return RunNow(name, "running" if is_locked(path) else "to do", None, None)
        try:
            written = (path / RUN_FILE).stat().st_mtime_ns
            if name in self._ended and self._ended[name][0] == written and not is_locked(path):
                return self._ended[name][1]
            snapshot = self._followers.setdefault(name, Follower(path)).look(now)
        except (PgtDiagError, FileNotFoundError) as error:
            # What another process is just writing may not fit together yet.
            if is_locked(path):
                return RunNow(name, "running", None, None)
            return RunNow(name, "damaged", str(error), None)
        run = RunNow(name, snapshot.status, snapshot.message, snapshot)
        if not snapshot.running:
            self._ended[name] = written, run
        return run

    def _between_runs(self, names: list[str], now: float) -> bool:
        """Whether a sweep has shown a sign of life not long ago, and none of its being stopped."""
        plan = self.path / PLAN_FILE
        if not plan.exists():
            return False
        signs = [plan.stat().st_mtime, *(last_write(self.path / name) for name in names)]
        return now - max(signs) < IDLE_SECONDS


def _is_left(run: RunNow) -> bool:
    return run.state in ("to do", "interrupted")


def _seconds_left(runs: tuple[RunNow, ...]) -> float | None:
    """Return about how long all the runs still take, at the rate of those that go on now.

    In images: runs of one sweep differ in their batch size, and so in how long an iteration takes.
    """
    known = [run.snapshot for run in runs if run.snapshot is not None]
    rate = sum(each.images_per_second or 0.0 for each in known if each.running)
    planned = [each.planned * each.batch_size for each in known if each.planned and each.batch_size]
    if not rate or not planned:
        return None
    left = 0.0
    for run in runs:
        each = run.snapshot
        if each is None and _is_left(run):
            left += sum(planned) / len(planned)
        elif each is not None and (each.running or _is_left(run)):
            left += max(0, (each.planned or 0) - each.iterations) * (each.batch_size or 0)
    return left / rate
