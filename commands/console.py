"""What a training run shows: a progress bar on a terminal, plain lines elsewhere, or JSON."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from commands.terminal import console, fitted, folded
from pgt_diag.config import Preset, RunConfig, as_typed
from pgt_diag.errors import ConfigurationError, DivergedError
from pgt_diag.progress import Listener, Plan
from pgt_diag.progress import Progress as TrainingProgress
from pgt_diag.run import load_run
from pgt_diag.text import printable, quoted

_LINE_SECONDS = 10.0
_BAR = 12
_FINAL = (ConfigurationError, DivergedError)
"""Errors after which a run cannot go on."""


class TrainingConsole(Listener):
    """Shows one run; use as a context manager around `train`."""

    def __init__(self, *, json_output: bool, preset: Preset | None, quiet: bool = False) -> None:
        self._json = json_output
        self._preset = f", preset {preset}" if preset else ""
        self._console = console(stderr=json_output)
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._plan: Plan | None = None
        self._metrics: dict[str, Any] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None or self._plan is None or issubclass(kind, _FINAL):
            return
        directory = quoted([self._plan.directory])
        self._print(
            f"what was recorded is in {directory} (pgt-diag report {directory}); go on with:",
            f"pgt-diag train --run-dir {directory} --resume",
        )

    def show_plan(self, plan: Plan) -> None:
        """Say what will be done."""
        config = plan.config
        method = f"{config.method}" + (f" α={config.alpha:g}" if config.method.uses_pgt else "")
        self._print(
            f"{config.model} (norm {config.norm}, {plan.parameters / 1e6:.2f} M parameters, "
            f"{plan.filters:,} filters) on {plan.data} ({plan.train_images:,} + "
            f"{plan.test_images:,} images){self._preset}"
        )
        self._print(
            f"{method}: {config.epochs} epochs, {plan.iterations:,} iterations of "
            f"{config.batch_size} images, lr {config.peak_lr:g} ({_lr_rule(config)}; warm-up "
            f"{config.warmup_epochs:g} epochs), weight decay {config.weight_decay:g}, "
            f"seed {config.seed}, {plan.device}, amp {plan.amp}"
            + (f", {plan.processes} processes" if plan.processes > 1 else "")
        )
        self._print(f"run directory: {plan.directory} (at most {plan.disk_bytes / 1e6:,.0f} MB)")
        if plan.resumed:
            self._print(
                f"going on from iteration {plan.done:,} of {plan.iterations:,}, {made_again(plan)}"
            )
        for note in plan.notes:
            self._print(f"note: {as_typed(note)}")
        if self._json:
            self._print_json({"plan": _plain(plan)})

    def show_result(self, path: Path) -> None:
        """Say how it ended."""
        # A run that was killed after its last epoch goes on without another.
        metrics = self._metrics or load_run(path).metrics.tail(1).to_dict("records")[0]
        if self._json:
            self._print_json({"run_dir": str(path), **metrics})
            return
        self._print(
            f"done: test accuracy {metrics['test_accuracy']:.2f} %, {metrics['dead_filters']} dead "
            "filters; next:",
            f"pgt-diag report {quoted([path])}",
        )

    def show_finished(self, path: Path) -> None:
        """Say that there is nothing to go on with."""
        if self._json:
            self._print_json({"run_dir": str(path), "finished": True})
            return
        self._print("already finished; next:", f"pgt-diag report {quoted([path])}")

    def started(self, plan: Plan) -> None:
        """Show the plan, and on a terminal the bar."""
        self._plan = plan
        if not self._json:
            self.show_plan(plan)
        if self._console.is_terminal and not self._json and not self._quiet:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(bar_width=_BAR),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "train", total=plan.iterations, epoch=1, epochs=plan.config.epochs, numbers=""
            )
            self._bar.start()

    def noted(self, message: str) -> None:
        """Say what is other than asked for."""
        self._print(f"note: {as_typed(message)}")

    def iterated(self, progress: TrainingProgress) -> None:
        """Move the bar, or print a line now and then."""
        if self._bar is not None:
            assert self._plan is not None
            epoch = f"epoch {progress.epoch + 1}/{self._plan.config.epochs}"
            room = self._console.width - len(epoch) - _BAR - 2
            self._bar.update(
                self._task,
                completed=progress.iteration,
                epoch=progress.epoch + 1,
                numbers=fitted(_numbers(progress), room, ("accuracy", "images/s", "loss")),
            )
        elif not self._json and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._print(f"iteration {progress.iteration}: {_numbers(progress)}")

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        """Print the epoch's line."""
        self._metrics = metrics
        if not self._json:
            self._print(
                f"epoch {metrics['epoch'] + 1}: train loss {metrics['train_loss']:.4f}, train "
                f"accuracy {metrics['train_accuracy']:.2f} %, test accuracy "
                f"{metrics['test_accuracy']:.2f} %, {metrics['images_per_second']:.0f} images/s, "
                f"{metrics['dead_filters']} dead filters"
            )

    def replaced_images(self, paths: list[str]) -> None:
        """Say that the result is of other images than those in the folder."""
        self._print(
            f"note: {len(paths)} unreadable images replaced by others of their class, {paths[0]} "
            "the first; all are in run.json"
        )

    def _print_json(self, values: dict[Any, Any]) -> None:
        if not self._quiet:
            print(json.dumps(values))

    def _print(self, text: str, command: str = "") -> None:
        self._last_line = time.monotonic()
        if not self._quiet:
            lines = folded(self._console.file, printable(text, 2000), printable(command, 2000))
            self._console.print(escape(lines), soft_wrap=True)


def _numbers(progress: TrainingProgress) -> str:
    shown = (
        ""
        if math.isnan(progress.loss)
        else f"loss {progress.loss:.3f}, accuracy {progress.accuracy:.0f} %, "
    )
    minutes, seconds = divmod(int(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    rate = f"{progress.images_per_second:.0f} images/s"
    return f"{shown}{rate}, {left} left, {progress.dead_filters} dead"


def made_again(plan: Plan) -> str:
    """Return in which epoch a run goes on, and what of it is made again."""
    epoch = f"epoch {min(plan.epoch + 1, plan.config.epochs)} of {plan.config.epochs}"
    if plan.recorded is None:
        return f"{epoch}; what was recorded since that checkpoint is made again"
    again = plan.recorded - plan.done
    if again <= 0:
        return f"{epoch}; nothing is made again"
    since = f"the {again:,} iterations" if again > 1 else "the iteration"
    verb = "are" if again > 1 else "is"
    return f"{epoch}; {since} recorded since that checkpoint {verb} made again"


def _plain(plan: Plan) -> dict[str, Any]:
    return {
        **{
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(plan).items()
        },
        "config": plan.config.to_mapping(),
    }


def _lr_rule(config: RunConfig) -> str:
    base = config.lr_base_batch
    return "constant" if base is None else f"linear, {config.lr:g} at batch {base}"
