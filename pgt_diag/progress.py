"""What a training run tells while it goes on: its plan, its progress, its epochs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pgt_diag.config import Amp, RunConfig
from pgt_diag.recorder import FilterRecorder


@dataclass(frozen=True)
class Plan:
    """What a run is about to do."""

    directory: Path
    config: RunConfig
    data: str
    train_images: int
    test_images: int
    image_size: int
    classes: int
    parameters: int
    filters: int
    device: str
    processes: int
    amp: Amp
    iterations: int
    done: int
    """Iterations made before, by the run that this one goes on with."""
    resumed: bool
    """Whether it goes on with a run, be it from its start."""
    epoch: int
    """The epoch, counted from 0, that it begins in."""
    recorded: int | None
    """Iterations that the run it goes on with has on disk, of which those from `done` on are made
    again; None if unknown."""
    disk_bytes: int
    """About how much the run will write, at most."""
    notes: tuple[str, ...]
    """What a person should know of the run that this one goes on with: damage, another machine."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; loss and accuracy (percent) are a second or so old."""

    epoch: int
    iteration: int
    loss: float
    accuracy: float
    images_per_second: float
    seconds_left: float
    dead_filters: int


class Listener:
    """Hears how training goes. The library prints nothing; override what you want to show."""

    def started(self, plan: Plan) -> None:
        """Before the first iteration."""

    def noted(self, message: str) -> None:
        """When a person should know something, and training goes on."""

    def iterated(self, progress: Progress) -> None:
        """After every iteration."""

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        """After every epoch, with its row of metrics.csv."""

    def replaced_images(self, paths: list[str]) -> None:
        """When an epoch has met more unreadable images; these others were used for so far."""


@dataclass(frozen=True)
class EpochMetrics:
    """An epoch's means over its training images, accuracy in percent, and what it took."""

    loss: float
    accuracy: float
    seconds: float
    images_per_second: float
    recorder_seconds: float


class Meter:
    """Times the epochs and foretells the end."""

    def __init__(self, batch_size: int, iterations: int) -> None:
        self._batch_size = batch_size
        self._iterations = iterations
        self._earlier = self._recorder_earlier = 0.0
        self.start(0)

    def start(self, step: int) -> None:
        """Start the clock, with `step` steps made by an earlier process."""
        self._first = step
        self._started = self._epoch_started = time.perf_counter()
        self._recorder_started = 0.0
        self._running = False

    def start_epoch(self, recorder_seconds: float) -> None:
        """Start the epoch's clock, or go on with it after `load_state_dict`.

        `recorder_seconds` is what the recorder has taken so far.
        """
        self._epoch_started = time.perf_counter()
        self._recorder_started = recorder_seconds
        self._running = True

    def state_dict(self, recorder_seconds: float) -> dict[str, float]:
        """Return what the epoch has taken so far, to go on from in another process."""
        return {
            "epoch_seconds": self._epoch_seconds(),
            "recorder_seconds": self._recorder_seconds(recorder_seconds),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Count the time that an earlier process has spent in this epoch."""
        self._earlier = float(state["epoch_seconds"])
        self._recorder_earlier = float(state["recorder_seconds"])

    def progress(self, epoch: int, recorder: FilterRecorder) -> Progress:
        """Return where the run stands."""
        done = recorder.steps - self._first
        elapsed = time.perf_counter() - self._started
        loss, accuracy = recorder.latest
        return Progress(
            epoch=epoch,
            iteration=recorder.steps,
            loss=loss,
            accuracy=accuracy,
            images_per_second=done * self._batch_size / elapsed,
            seconds_left=elapsed / done * (self._iterations - recorder.steps),
            dead_filters=recorder.dead_filters,
        )

    def finish_epoch(self, sums: Tensor, batches: int, recorder: FilterRecorder) -> EpochMetrics:
        """Stop the epoch's clock; return its metrics.

        sums: (2,) Σ loss and correct predictions of so many batches. A state that is saved from
        here to `next_epoch` has the time of the epoch's training, and of nothing else.
        """
        images = batches * self._batch_size
        loss, correct = (sums / images).tolist()
        self._earlier = self._epoch_seconds()
        self._recorder_earlier = self._recorder_seconds(recorder.seconds)
        self._running = False
        return EpochMetrics(
            loss=loss,
            accuracy=100 * correct,
            seconds=self._earlier,
            images_per_second=images / self._earlier,
            recorder_seconds=self._recorder_earlier,
        )

    def next_epoch(self) -> None:
        """Forget the time of the epoch that is over."""
        self._earlier = self._recorder_earlier = 0.0

    def _epoch_seconds(self) -> float:
        since = time.perf_counter() - self._epoch_started if self._running else 0.0
        return self._earlier + since

    def _recorder_seconds(self, now: float) -> float:
        return self._recorder_earlier + (now - self._recorder_started if self._running else 0.0)
