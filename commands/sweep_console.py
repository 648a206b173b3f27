"""What a sweep shows: its plan, one view of all its runs, and how they ended."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from commands.columns import Column, fitting_table
from commands.console import made_again
from commands.terminal import console, duration, fitted, folded, say, shortened
from pgt_diag.config import as_typed
from pgt_diag.errors import PgtDiagError
from pgt_diag.machine import busy_cpus, busy_note
from pgt_diag.progress import Listener, Plan
from pgt_diag.progress import Progress as TrainingProgress
from pgt_diag.sweep.grid import Grid, Row
from pgt_diag.sweep.making import SweepListener, is_to_do
from pgt_diag.sweep.status import RowStatus, State, status_of
from pgt_diag.text import printable, quoted

_LINE_SECONDS = 10.0
_BAR, _BARS_FROM, _NAME = 12, 80, 30
"""Columns of a bar, of a terminal that has room for bars, and of a run's name at least."""


def print_plan(
    grid: Grid, folder: Path, processes: int = 1, *, retry_failed: bool, json_output: bool
) -> None:
    """Print the rows, how each stands, and what the sweep still needs.

    processes: how many would make each run together.
    Raises, after that, what keeps the time from being estimated: missing data for example.
    """
    from pgt_diag.sweep.estimate import Estimate, estimate

    statuses = [status_of(row, folder) for row in grid.rows]
    left = [each for each in statuses if is_to_do(each, retry_failed=retry_failed)]
    problem: PgtDiagError | None = None
    estimates: dict[Row, Estimate] = {}
    if left:
        say("measuring a few iterations of each size that no run has finished yet", stderr=True)
    try:
        found = estimate(statuses, folder, processes)
        estimates = {each.row: what for each, what in zip(statuses, found, strict=True)}
    except PgtDiagError as error:
        problem = error
    needed = [estimates[each.row] for each in left if each.row in estimates]
    seconds, size = sum(each.seconds for each in needed), sum(each.disk_bytes for each in needed)
    if json_output:
        rows = [
            each.to_mapping()
            | {
                "estimated_seconds": estimates[each.row].seconds if estimates else None,
                "disk_bytes": estimates[each.row].disk_bytes if estimates else None,
                "flops": estimates[each.row].flops if estimates else None,
                "memory_bytes": estimates[each.row].memory_bytes if estimates else None,
                "estimate_source": estimates[each.row].source if estimates else None,
            }
            for each in statuses
        ]
        totals = {"estimated_seconds": seconds, "disk_bytes": size} if estimates else {}
        plan = {"sweep_dir": str(folder), "lr_rule": grid.lr_rule, "rows": rows, **totals}
        print(json.dumps(plan))
    else:
        _print_rows(statuses, estimates)
        for each in statuses:
            if each.message:
                say(as_typed(f"{each.state}: {each.row.name}: {each.message}"))
        say(f"learning rate {grid.rule}")
        counts = ", ".join(
            f"{sum(each.state is state for each in statuses)} {state}"
            for state in State
            if any(each.state is state for each in statuses)
        )
        say(f"{_runs(len(statuses))} in {folder}: {counts}")
        if estimates:
            alone = ", by one process" if processes > 1 else ""
            say(
                f"still to do: {_runs(len(left))}, about {duration(seconds)} one after the other "
                f"on this machine{alone}, at most {size / 1e6:,.0f} MB"
            )
            if (busy := busy_note(busy_cpus())) is not None:
                say(f"{busy}; an idle machine is faster")
        if needed:
            largest = max(each.memory_bytes for each in needed)
            each_process = " in each process" if processes > 1 else ""
            say(
                f"to compute: {sum(each.flops for each in needed):.3g} FLOP; a step of the largest "
                f"run keeps {largest / 1e9:.2g} GB in float32{each_process}, mixed precision about "
                "half of that"
            )
    if problem is not None:
        raise problem


def print_result(results: Sequence[RowStatus], folder: Path, *, json_output: bool) -> bool:
    """Say how the rows ended, a line for each failed one; return whether one has failed."""
    failed = [each for each in results if each.state is State.FAILED]
    if json_output:
        rows = [each.to_mapping() for each in results]
        counts = {"finished": len(results) - len(failed), "failed": len(failed)}
        print(json.dumps({"sweep_dir": str(folder), **counts, "rows": rows}))
        return bool(failed)
    for each in failed:
        say(as_typed(f"failed: {each.row.name}: {each.message}"))
    retry = "; --retry-failed makes them again" if failed else ""
    say(
        f"{len(results) - len(failed)} of {_runs(len(results))} finished, {len(failed)} failed"
        f"{retry}; next:",
        f"pgt-diag report {quoted([folder])}",
    )
    return bool(failed)


class SweepConsole(SweepListener):
    """One view of a whole sweep: bars on a terminal, plain lines elsewhere, nothing with --json."""

    def __init__(self, grid: Grid, folder: Path, *, json_output: bool) -> None:
        self._grid = grid
        self._folder = folder
        self._silent = json_output
        self._screen = console(stderr=json_output)
        self._bars: Progress | None = None
        self._whole = TaskID(0)
        self._tasks: dict[Row, TaskID] = {}
        self._statuses: dict[Row, RowStatus] = {}
        self._seconds: dict[Row, float] = {}
        self._line = 0.0

    def __enter__(self) -> Self:
        if not self._silent:
            say(f"{_runs(len(self._grid.rows))} in {self._folder}; learning rate {self._grid.rule}")
        if self._screen.is_terminal and not self._silent:
            wide = self._screen.width >= _BARS_FROM
            self._bars = Progress(
                TextColumn("{task.description}"),
                *([BarColumn(bar_width=_BAR)] if wide else []),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._screen,
            )
            rows = len(self._grid.rows)
            self._whole = self._bars.add_task("sweep", total=rows, numbers="")
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def row_listener(self, row: Row) -> Listener:
        """Return who shows this row's training in the view."""
        return _RowListener(self, row)

    def changed(self, status: RowStatus) -> None:
        """Show a row that has ended, or that another process makes."""
        before = self._statuses.get(status.row)
        self._statuses[status.row] = status
        if status.seconds is not None:
            self._seconds[status.row] = status.seconds
        if status.state is State.RUNNING:
            total = f" of {status.planned:,}" if status.planned else ""
            self.show(
                status.row,
                status.done,
                status.planned,
                ", ".join(filter(None, (f"iteration {status.done:,}{total}", status.message))),
                at_once=before is None,
            )
            return
        if self._bars is not None and status.row in self._tasks:
            self._bars.remove_task(self._tasks.pop(status.row))
        accuracy = status.test_accuracy
        told = f", test accuracy {accuracy:.2f} %" if accuracy is not None else ""
        why = f": {as_typed(status.message)}" if status.message else ""
        self._say(f"{status.row.name}: {status.state}{told}{why}{self._summary()}")
        self._move()

    def show(
        self, row: Row, done: int, planned: int | None, numbers: str, *, at_once: bool = False
    ) -> None:
        """Show where a row's run stands, in a line only now and then."""
        if self._bars is not None:
            if row not in self._tasks:
                name = shortened(row.name, max(_NAME, self._screen.width // 3))
                self._tasks[row] = self._bars.add_task(name, total=planned, numbers="")
            numbers = fitted(numbers, self._room(), ("images/s", "loss", "dead"))
            self._bars.update(self._tasks[row], completed=done, total=planned, numbers=numbers)
            self._move()
        elif at_once or time.monotonic() - self._line > _LINE_SECONDS:
            self._say(f"{row.name}: {numbers}{self._summary()}")

    def _room(self) -> int:
        """Return how many columns of the terminal are left for a run's numbers."""
        width = self._screen.width
        assert self._bars is not None
        names = max(len(task.description) for task in self._bars.tasks)
        return width - names - 1 - (_BAR + 1 if width >= _BARS_FROM else 0)

    def remember(self, status: RowStatus) -> None:
        """Learn how a row stands."""
        self._statuses[status.row] = status

    def expect(self, row: Row, seconds: float) -> None:
        """Learn how long a row's run takes in all."""
        self._seconds[row] = seconds

    def _move(self) -> None:
        if self._bars is not None:
            ended, left = self._progress()
            numbers = f"{ended} of {_runs(len(self._grid.rows))}{left}"
            self._bars.update(self._whole, completed=ended, numbers=numbers)

    def _summary(self) -> str:
        ended, left = self._progress()
        return f" (sweep: {ended} of {_runs(len(self._grid.rows))}{left})"

    def _progress(self) -> tuple[int, str]:
        """Return how many rows have ended, and about how long the others take."""
        ended = {row for row, each in self._statuses.items() if each.state is not State.RUNNING}
        if not self._seconds:
            return len(ended), ""
        per_epoch: dict[int, list[float]] = {}
        for row, seconds in self._seconds.items():
            rate = seconds / row.config.epochs
            per_epoch.setdefault(row.config.batch_size, []).append(rate)
        everywhere = statistics.fmean(rate for rates in per_epoch.values() for rate in rates)
        left = 0.0
        at_once = 1
        for row in self._grid.rows:
            if row in ended:
                continue
            rate = statistics.fmean(per_epoch.get(row.config.batch_size, [everywhere]))
            status = self._statuses.get(row)
            at_once += status is not None and status.planned is not None
            share = status.done / status.planned if status and status.planned else 0.0
            left += rate * row.config.epochs * (1 - share)
        left /= max(1, at_once - 1)
        return len(ended), f", about {duration(left)} left" if left else ""

    def _say(self, text: str) -> None:
        self._line = time.monotonic()
        if not self._silent:
            lines = folded(self._screen.file, printable(text, 2000))
            self._screen.print(escape(lines), soft_wrap=True)


class _RowListener(Listener):
    """Shows one run of the sweep."""

    def __init__(self, view: SweepConsole, row: Row) -> None:
        self._view = view
        self._row = row
        self._started = time.monotonic()
        self._plan: Plan | None = None

    def started(self, plan: Plan) -> None:
        """Say that the run begins, or goes on."""
        self._plan = plan
        self._show(
            plan.done, f"goes on in {made_again(plan)}" if plan.resumed else "starts", at_once=True
        )
        for note in plan.notes:
            say(f"note: {self._row.name}: {note}", stderr=True)

    def iterated(self, progress: TrainingProgress) -> None:
        """Show the numbers."""
        plan = self._plan
        assert plan is not None
        rate = (time.monotonic() - self._started) / max(1, progress.iteration - plan.done)
        self._view.expect(self._row, rate * plan.iterations)
        self._show(
            progress.iteration,
            f"loss {progress.loss:.3f}, {progress.images_per_second:.0f} images/s, "
            f"{progress.dead_filters} dead",
        )

    def _show(self, done: int, numbers: str, *, at_once: bool = False) -> None:
        assert self._plan is not None
        total = self._plan.iterations
        text = f"iteration {done:,} of {total:,}, {numbers}"
        status = RowStatus(self._row, State.RUNNING, done=done, planned=total)
        self._view.remember(status)
        self._view.show(self._row, done, total, text, at_once=at_once)


def _runs(count: int) -> str:
    return f"{count} run{'s'[: count != 1]}"


def _print_rows(statuses: Sequence[RowStatus], estimates: dict[Row, Any]) -> None:
    screen = console()
    configs = [each.row.config for each in statuses]
    found = [estimates.get(each.row) for each in statuses]
    alphas = [f"{each.alpha:g}" if each.method.uses_pgt else "–" for each in configs]
    times = [duration(what.seconds) if what and what.seconds else "–" for what in found]
    sources = [what.source if what and what.seconds else "" for what in found]
    columns = [
        Column("run", [shortened(each.row.name, 80) for each in statuses], right=False),
        Column("method", [str(each.method) for each in configs], rank=7),
        Column("α", alphas, rank=6),
        Column("batch", [str(each.batch_size) for each in configs], rank=5),
        Column("lr", [f"{each.peak_lr:g}" for each in configs], rank=3),
        Column("seed", [str(each.seed) for each in configs], rank=4),
        Column("state", list(map(_state, statuses)), right=False, folds=True),
        Column("time", times, rank=1),
        Column("from", sources, right=False, rank=2),
    ]
    screen.print(fitting_table(screen, None, columns)[0])


def _state(status: RowStatus) -> str:
    if status.planned and status.state in (State.INTERRUPTED, State.RUNNING):
        return f"{status.state} at {status.done:,} of {status.planned:,}"
    return str(status.state)
