"""Following a run that goes on: what its directory says now, as plain values.

Reads little at each look: run.json, the newest part of the trace, and the event log.
"""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from pgt_diag import trace
from pgt_diag.directory import METRICS_FILE, RUN_FILE
from pgt_diag.run import Run, load_run
from reports.summary import RunSummary
from reports.zeroout import zero_out_map

RATE_SECONDS = 60.0
"""The rate is that of about the last minute."""

STALL_SECONDS = 15.0
"""A recorder writes twice a second; a run without news for so long hangs, or has long steps."""


@dataclass(frozen=True)
class LayerNow:
    """A layer's dead filters: now, and over the run so far in equal stretches.

    `unknown` counts those of which nobody can tell whether they are dead.
    """

    name: str
    index: int
    filters: int
    dead: int
    history: tuple[int, ...]
    unknown: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. What is not known is None; `iterations` counts those on disk.

    `silent_for` is how many seconds nothing new has been written.
    """

    name: str
    status: str
    message: str | None
    iterations: int
    planned: int | None
    batch_size: int | None
    loss: float | None
    accuracy: float | None
    test_accuracy: float | None
    """Of the best epoch so far, in percent."""
    iterations_per_second: float | None
    images_per_second: float | None
    seconds_left: float | None
    silent_for: float
    filters: int
    dead: int
    unknown: int
    layers: tuple[LayerNow, ...]

    @property
    def running(self) -> bool:
        """Whether run.json says that the run goes on; a killed run says so for ever."""
        return self.status == "running"

    @property
    def stalled(self) -> bool:
        """Whether a run that says it goes on has written nothing for a while."""
        return self.running and self.silent_for >= STALL_SECONDS


class Follower:
    """Looks at one run directory again and again."""

    def __init__(self, path: Path, columns: int = 32) -> None:
        self.path = path
        self._columns = columns
        self._seen: deque[tuple[float, int]] = deque()

    def look(self, now: float) -> Snapshot:
        """Return the run as it is at `now` (seconds since the epoch, as file times are).

        Raises RunDirectoryError when there is no run, or it cannot be read.
        """
        run = load_run(self.path)
        iterations = run.iteration_count
        written = last_write(self.path)
        if not self._seen or self._seen[-1][1] != iterations:
            self._seen.append((min(now, written), iterations))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_SECONDS:
            self._seen.popleft()
        layers = _layers(run, self._columns) if iterations else ()
        rate = self._rate(run, iterations)
        planned = run.info.get("planned_iterations")
        planned = planned if isinstance(planned, int) else None
        left = (planned - iterations) / rate if rate and planned else None
        message = run.info.get("message")
        return Snapshot(
            name=run.name,
            status=run.status,
            message=None if message is None else str(message),
            iterations=iterations,
            planned=planned,
            batch_size=run.config.batch_size if run.config else None,
            loss=_known(run.latest.get("loss")),
            accuracy=_known(run.latest.get("accuracy")),
            test_accuracy=_test_accuracy(run),
            iterations_per_second=rate,
            images_per_second=rate * run.config.batch_size if rate and run.config else None,
            seconds_left=max(0.0, left) if left is not None else None,
            silent_for=max(0.0, now - written),
            filters=sum(layer.filters for layer in run.layers),
            dead=sum(layer.dead for layer in layers),
            unknown=sum(layer.unknown for layer in layers),
            layers=layers,
        )

    def _rate(self, run: Run, iterations: int) -> float | None:
        """Return iterations per second: as seen from here, or else as the last epochs had it."""
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        if last > first and end > start:
            return (last - first) / (end - start)
        metrics = run.metrics
        if not iterations or run.config is None or "images_per_second" not in metrics:
            return None
        rate = float(metrics["images_per_second"].tail(3).median()) / run.config.batch_size
        return rate if math.isfinite(rate) and rate > 0 else None


def last_write(path: Path) -> float:
    """Return when something was last written to a run directory, in seconds since the epoch."""
    folders = (path / trace.ITERATIONS_FOLDER, path / trace.NORMS_FOLDER)
    places = (path / RUN_FILE, path / METRICS_FILE, *folders)
    return max((place.stat().st_mtime for place in places if place.exists()), default=0.0)


def _test_accuracy(run: Run) -> float | None:
    metrics = run.metrics
    return _known(float(metrics["test_accuracy"].max())) if "test_accuracy" in metrics else None


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _layers(run: Run, columns: int) -> tuple[LayerNow, ...]:
    summary = RunSummary(run, run.name)
    found = zero_out_map(summary, columns)
    counts = zip(run.layers, found.dead.to_numpy(), found.unknown.to_numpy(), strict=True)
    return tuple(
        LayerNow(
            layer.name,
            layer.index,
            layer.filters,
            int(dead[-1]),
            tuple(map(int, dead)),
            int(unknown[-1]),
        )
        for layer, dead, unknown in counts
        if len(dead)
    )
