"""What is left of a sweep: time, from finished rows or a few real iterations, work and disk."""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgt_diag import training
from pgt_diag.config import RunConfig
from pgt_diag.cost import Cost, run_cost
from pgt_diag.progress import Listener, Plan, Progress
from pgt_diag.sweep.status import RowStatus, State


@dataclass(frozen=True)
class Estimate:
    """What one row still takes: seconds, bytes at most, and where the seconds are known from.

    flops is what is left to compute, memory_bytes what a step needs at least, in float32, in each
    of the processes that share it.
    """

    seconds: float
    disk_bytes: int
    source: str
    flops: float = 0.0
    memory_bytes: int = 0


def estimate(statuses: Sequence[RowStatus], folder: Path, processes: int = 1) -> list[Estimate]:
    """Return what each of these rows takes, 0 for those that are finished.

    processes: how many share each batch. Seconds that are measured are those of one process.
    Raises what `pgt_diag.training.plan` does.
    """
    finished = [
        (_shape(status.row.config), status.seconds)
        for status in statuses
        if status.seconds is not None
    ]
    measured: dict[RunConfig, tuple[float, int, Cost]] = {}
    result = []
    for status in statuses:
        config = status.row.config
        if status.state is State.FINISHED:
            result.append(Estimate(0, 0, "finished"))
            continue
        shape = _shape(config)
        like = [seconds for made, seconds in finished if made == shape]
        source = f"{len(like)} finished of this size"
        if shape not in measured:
            plan = training.plan(shape, folder / ".plan")
            seconds = 0.0 if like else _measure(shape, plan)
            measured[shape] = seconds, plan.disk_bytes, _cost(shape, plan, processes)
        seconds, disk_bytes, cost = measured[shape]
        if like:
            seconds = statistics.fmean(like)
        else:
            source = "a few iterations measured here"
        share = 1 - status.done / status.planned if status.planned else 1
        result.append(
            Estimate(
                seconds * share,
                round(disk_bytes * share),
                source,
                flops=cost.flops * share,
                memory_bytes=cost.memory_bytes,
            )
        )
    return result


_ITERATIONS = 8
_WARM_UP = 3
_TEST_SHARE = 1 / 3
"""A test image costs a forward pass, a third of a training image's."""
_TRIAL_SECONDS = 30.0
_MAX_PIXELS = 1 << 20
"""Of a batch measured on a CPU: larger ones only take longer per batch, and may not fit."""


class _EnoughError(Exception):
    pass


class _Stopwatch(Listener):
    def __init__(self) -> None:
        self.times: list[float] = []

    def iterated(self, progress: Progress) -> None:
        self.times.append(time.perf_counter())
        late = len(self.times) > 1 and self.times[-1] - self.times[0] > _TRIAL_SECONDS
        if late or len(self.times) > _WARM_UP + _ITERATIONS:
            raise _EnoughError

    @property
    def seconds(self) -> float:
        """Seconds per iteration, of those after the warm-up where there are as many."""
        steps = [later - before for before, later in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(steps[_WARM_UP:] or steps or [0.0])


def _shape(config: RunConfig) -> RunConfig:
    """Return the configuration without what time and disk hardly depend on."""
    same = ("method", "alpha", "clip_norm", "agc_clip_factor", "agc_eps", "agc_classifier",
            "lr", "lr_rule", "lr_base_batch", "lr_update", "weight_decay", "momentum",
            "nesterov", "decay_biases", "label_smoothing", "schedule", "step_epochs",
            "warmup_epochs", "warmup_lr", "warmup_prefix", "cooldown_epochs", "min_lr",
            "seed")  # fmt: skip
    values = {key: getattr(RunConfig, key) for key in same}
    return dataclasses.replace(config, **(values | {"warmup_epochs": 0.0}))


def _cost(config: RunConfig, plan: Plan, processes: int) -> Cost:
    # A process has its share of the batch in as many parts.
    parts = min(config.batch_size, config.accumulate * processes)
    return run_cost(
        dataclasses.replace(config, accumulate=parts),
        train_images=plan.train_images,
        test_images=plan.test_images,
        image_size=plan.image_size,
        classes=plan.classes,
    )


def _measure(config: RunConfig, plan: Plan) -> float:
    """Return about how long a run takes, from a few of its iterations made in a scratch folder."""
    batch = config.batch_size
    if plan.device == "cpu":
        batch = max(config.accumulate, min(batch, _MAX_PIXELS // plan.image_size**2))
    stopwatch = _Stopwatch()
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(_EnoughError):
        # A rate at which nothing diverges; snapshots are few in a real run.
        trial = dataclasses.replace(
            config, batch_size=batch, lr=1e-4, warmup_lr=0.0, feature_map_snapshots=0
        )
        training.train(trial, Path(scratch) / "trial", listener=stopwatch)
    images = plan.train_images + _TEST_SHARE * plan.test_images
    return stopwatch.seconds / batch * images * config.epochs
