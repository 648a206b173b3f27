"""What `pgt-diag watch` shows of a sweep, or of a folder of runs: how each of them stands."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from commands.columns import Column, fitting_table
from commands.terminal import duration, safe, shortened
from commands.watch_frames import MAX_LINE, View, iteration_of, numbers_of, rows_in
from pgt_diag.config import as_typed
from pgt_diag.text import quoted
from reports.follow import Snapshot
from reports.follow_sweep import RunNow, SweepFollower, SweepSnapshot


class SweepView(View[SweepSnapshot]):
    """A sweep, or a folder of runs, by run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SweepFollower(path).look)

    def share(self) -> tuple[float, float] | None:
        """Return how many runs have finished, counting those that go on by their share."""
        done = float(self._now.count("finished"))
        for run in self._now.runs:
            now = run.snapshot
            if now is not None and now.planned and run.state != "finished":
                done += min(1.0, now.iterations / now.planned)
        return done, len(self._now.runs)

    def numbers(self) -> list[str]:
        """Return how many runs are in which state, what those that go on do, and the time left."""
        states = dict.fromkeys(["running", "to do", *(run.state for run in self._now.runs)])
        counts = [f"{count} {state}" for state in states if (count := self._now.count(state))]
        finished = f"{self._now.count('finished')} of {len(self._now.runs)} runs finished"
        parts = [finished, *(each for each in counts if not each.endswith(" finished"))]
        if self._now.seconds_left is not None:
            parts.append(f"about {duration(self._now.seconds_left)} left")
        elif self._now.running and not self._now.count("running"):
            parts.append("waiting for the next run")
        return parts

    def news(self) -> object:
        """Return what differs when there is something new to print."""
        return [(run.state, run.snapshot and run.snapshot.iterations) for run in self._now.runs]

    def line(self) -> str:
        """Return it on one line, with what goes on."""
        going_on = [
            f"{run.name}: {', '.join([iteration_of(run.snapshot), *numbers_of(run.snapshot)])}"
            for run in self._now.runs
            if run.state == "running" and run.snapshot
        ]
        return safe(" · ".join([*self.numbers(), *going_on]), MAX_LINE)

    def table(self, screen: Console, room: int | None) -> Table:
        """Return the runs; where not all fit, those that go on or failed, then the newest."""
        runs = list(self._now.runs)
        by_interest = sorted(range(len(runs)), key=lambda place: _interest(runs[place], place))
        places = sorted(by_interest[: rows_in(runs, room)])
        shown = [runs[place] for place in places]
        hidden = len(runs) - len(shown)
        more = [f"and {hidden} more runs"] * bool(hidden)
        blank = [""] * len(more)
        known = [run.snapshot for run in shown]
        columns = [
            Column("run", [_run_name(screen, run) for run in shown] + more, right=False),
            Column("state", [_state(run) for run in shown] + blank, right=False),
            Column("done", [_done(each) for each in known] + blank, rank=1),
            Column("test %", [_accuracy(each) for each in known] + blank, rank=2),
            Column("dead", [f"{each.dead:,}" if each else "–" for each in known] + blank),
            Column("left", [_left(each) for each in known] + blank, rank=3),
            Column("iterations/s", [_rate(each) for each in known] + blank, rank=4),
        ]
        return fitting_table(screen, None, columns)[0]

    def ending(self) -> tuple[str, str]:
        """Return how they ended, and the command that comes next."""
        now = self._now
        failed = [
            as_typed(f"{run.name} {run.state}: {run.message}") for run in now.runs if run.message
        ]
        counts = ", ".join(self.numbers())
        left = any(run.state in ("to do", "interrupted") for run in now.runs)
        goes_on = "; none is running, the command that started them goes on" if left else ""
        text = "; ".join([f"{now.status}: {counts}{goes_on}", *failed, "next:"])
        return text, f"pgt-diag report {quoted([self._path])}"


def _interest(run: RunNow, place: int) -> tuple[int, int]:
    ranks = {"running": 0, "to do": 3, "finished": 2}
    rank = ranks.get(run.state, 1)
    return rank, place if rank == 3 else -place


def _run_name(screen: Console, run: RunNow) -> str:
    return shortened(run.name, max(20, screen.width // 2))


def _state(run: RunNow) -> str:
    stalled = run.snapshot is not None and run.snapshot.stalled
    return "no new data" if stalled else safe(run.state)


def _done(now: Snapshot | None) -> str:
    if now is None:
        return "–"
    return f"{100 * now.iterations / now.planned:.0f} %" if now.planned else f"{now.iterations:,}"


def _accuracy(now: Snapshot | None) -> str:
    return "–" if now is None or now.test_accuracy is None else f"{now.test_accuracy:.2f}"


def _left(now: Snapshot | None) -> str:
    if now is None or not now.running or now.seconds_left is None:
        return ""
    return duration(now.seconds_left)


def _rate(now: Snapshot | None) -> str:
    if now is None or not now.running or not now.iterations_per_second:
        return ""
    return f"{now.iterations_per_second:.3g}"
