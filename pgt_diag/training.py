"""The training loop: one run from its configuration to a sealed run directory."""

import copy
import json
import math
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import pgt_diag
from pgt_diag import checkpoint
from pgt_diag.activations import convolutions
from pgt_diag.allocator import keep_freed_memory
from pgt_diag.checkpoint import KEPT
from pgt_diag.config import Amp, CudaGraph, Norm, RunConfig
from pgt_diag.data import ImageData, fetch_data, load_data
from pgt_diag.data.base import random_number
from pgt_diag.data.changes import check_training_set, contents_state, data_changes
from pgt_diag.directory import check_vacant
from pgt_diag.distributed import World, is_of_a_peer, resolve_device
from pgt_diag.encoder import default_record_every
from pgt_diag.errors import (
    ConfigurationError,
    DivergedError,
    NoSpaceError,
    PgtDiagError,
    RunDirectoryError,
)
from pgt_diag.graph import CudaCapture
from pgt_diag.machine import usable_cpus, usable_threads
from pgt_diag.models import build_model
from pgt_diag.openmp import sharing_cpus
from pgt_diag.preflight import check_shares
from pgt_diag.progress import Listener, Meter, Plan
from pgt_diag.reading import Ending
from pgt_diag.recorder import FilterRecorder
from pgt_diag.resuming import ResumePoint
from pgt_diag.schedules import learning_rate
from pgt_diag.step import REMEDY, TrainingStep, autocast, build_optimizer, diverged


def train(
    config: RunConfig,
    directory: str | Path,
    *,
    listener: Listener | None = None,
    download: bool = False,
    force: bool = False,
    resume: ResumePoint | None = None,
    accept_changed_data: bool = False,
    stop: Callable[[], bool] = lambda: False,
    command: Sequence[str] | None = None,
    world: World | None = None,
) -> Path:
    """Train and record one run in `directory`; return its path.

    resume: go on from there (`pgt_diag.resuming.resume_point`) instead of starting a run; the
    result is the same, on a CPU to the bit. accept_changed_data: go on also where the training set
    is no longer that of the run, and record it; another test set is accepted anyhow, and recorded
    as well. stop: asked after every iteration; when it says so, a checkpoint is written and
    KeyboardInterrupt raised. world: the processes that train together, each of which calls this
    function with the same arguments; by default this one alone. On a CPU the process keeps the
    memory that it has once taken: see `pgt_diag.allocator`.

    Raises ConfigurationError, DataError or RunDirectoryError before anything is written,
    NoSpaceError also when the disk cannot hold the run, and DivergedError when the loss becomes
    NaN or infinite. However it ends, what was recorded is on disk and readable, and run.json says
    how it ended.
    """
    directory = Path(directory)
    state = resume.state if resume is not None else None
    world = world or World(0, 1, resolve_device(config.device))
    with world.together():
        if resume is None and world.first:
            check_vacant(directory, force=force)
        session = _Session(
            config,
            directory,
            world,
            download=download,
            state=state,
            accept_changed_data=accept_changed_data,
        )
        if world.first:
            session.check_space(new=state is None)
    with world.together():
        session.record(force=force, command=command, resume=resume)
    shared = sharing_cpus() if world.device.type == "cpu" else nullcontext(threading.Event())
    with shared as busy:
        return session.run(listener or Listener(), stop, resume, busy)


def plan(
    config: RunConfig,
    directory: str | Path,
    *,
    download: bool = False,
    force: bool = False,
    resume: ResumePoint | None = None,
    accept_changed_data: bool = False,
    processes: int = 1,
) -> Plan:
    """Return what `train` would do, having checked everything it checks, and write nothing.

    processes: how many would train together.
    """
    if resume is None:
        check_vacant(Path(directory), force=force)
    world = World(0, processes, resolve_device(config.device))
    state = resume.state if resume is not None else None
    session = _Session(
        config,
        Path(directory),
        world,
        download=download and processes == 1,
        state=state,
        accept_changed_data=accept_changed_data,
    )
    session.check_space(new=state is None)
    return session.plan(resume)


def resolve_amp(amp: Amp, device: torch.device) -> Amp:
    """Return the precision used: bf16 on CUDA unless asked otherwise, and float32 on CPU.

    On CPUs bf16 is slower, and on some its convolutions give other gradients at every run.
    """
    if amp is Amp.AUTO:
        return Amp.BF16 if device.type == "cuda" else Amp.OFF
    if amp is not Amp.OFF and device.type == "cpu":
        raise ConfigurationError(f"amp is {amp} and there is no GPU to use it; use off or auto")
    return amp


def resolve_graph(choice: CudaGraph, world: World) -> bool:
    """Return whether the step is captured as a CUDA graph: that takes one process with a GPU."""
    possible = world.device.type == "cuda" and world.size == 1
    if choice is CudaGraph.ON and not possible:
        why = f"{world.size} processes train" if world.size > 1 else "there is no GPU"
        raise ConfigurationError(f"cuda_graph is on and {why}; use auto or off")
    return possible and choice is not CudaGraph.OFF


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the hardware that a result depends on."""
    return {
        "pgt_diag": pgt_diag.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        **({"timm": sys.modules["timm"].__version__} if "timm" in sys.modules else {}),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": usable_cpus(),
        "threads": torch.get_num_threads(),
    }


def set_threads(count: int | None) -> None:
    """Use so many CPU threads; None: as many as torch chose, but no more than there are CPUs."""
    chosen = torch.get_num_threads()
    wanted = usable_threads(chosen) if count is None else count
    if count is not None or wanted != chosen:
        torch.set_num_threads(wanted)


_BUSY = "other processes, its own loaders among them, take CPUs from training and slow it down"
_CHECKPOINT_SECONDS = 300.0
_MISFITS = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError)
"""What loading a checkpoint of another run raises."""


EPOCH_COLUMNS = (
    "epoch",
    "iteration",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "lr",
    "seconds",
    "images_per_second",
    "recorder_seconds",
    "dead_filters",
)
"""The columns of metrics.csv."""


def _check_single_images(model: nn.Module, image: Tensor, config: RunConfig) -> None:
    """Raise ConfigurationError where batch normalisation cannot train on one image at a time.

    image: (1, 3, S, S) float. It has nothing to average over where a map is one value.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            copy.deepcopy(model)(image)
    except ValueError as error:
        raise ConfigurationError(
            f"batch_size is {config.batch_size}, and {config.model} with batch normalisation needs "
            f"more than one image at a time in each process ({str(error).partition(', got')[0]})"
        ) from None


def _changed(change: tuple[str, str]) -> str:
    """Say that a split has changed, and what that means."""
    split, what = change
    if split == "train":
        return f"the training set has changed, which is accepted and recorded: {what}"
    return f"the test set has changed, and test accuracies so far are of the earlier one: {what}"


def _options(group: Mapping[str, Any]) -> dict[str, str]:
    # As text: to the fused step 0 and False are not the same.
    return {key: repr(value) for key, value in group.items() if key not in ("params", "lr")}


@dataclass
class _Position:
    """Where in the epochs training stands: the next batch, and what the epoch has summed up."""

    epoch: int
    batch: int
    sums: Tensor
    """Σ loss and correct predictions of the epoch so far, (2,) float64, on the device."""

    def state_dict(self, steps: int, each: int) -> dict[str, Any]:
        """Return it; steps: made so far, which are others where epochs did not all have `each`."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.sums.cpu(),
            "extra": steps - (self.epoch * each + self.batch),
        }

    def next_epoch(self) -> None:
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, torch.zeros_like(self.sums)


class _Session:
    """The objects of one run."""

    recorder: FilterRecorder
    step: TrainingStep

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        world: World,
        *,
        download: bool,
        state: Mapping[str, Any] | None,
        accept_changed_data: bool,
    ) -> None:
        self.config = config
        self.directory = directory
        self.world = world
        self.device = world.device
        self.amp = resolve_amp(config.amp, self.device)
        self.captured = resolve_graph(config.cuda_graph, world)
        check_shares(config, world.size)
        set_threads(config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(mode=True)
        self.data = self._load_data(download=download)
        self.changes: dict[str, str] = {}
        if state is not None and world.first:
            self.changes = self._changes(state, accept=accept_changed_data)
        # What the length of a run decides stays as it was at its start.
        self.settings: Mapping[str, Any] = state["recorder"]["settings"] if state else {}
        self.iterations = self._planned(state)
        self.model = self._build_model()
        if self.world.rank:
            # Dropout of its own; the weights are the first process's.
            torch.manual_seed(random_number("process", config.seed, self.world.rank))
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is Amp.FP16)
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        self.position = _Position(epoch=0, batch=0, sums=sums)
        self.meter = Meter(config.batch_size, self.iterations)
        self.bad_images: dict[str, dict[str, str]] = {}

    def _load_data(self, *, download: bool) -> ImageData:
        if download:
            self.world.on_each_machine(lambda: fetch_data(self.config))
        return load_data(self.config, device=self.device, shard=self.world.shard)

    @cached_property
    def data_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, to find it changed later."""
        return contents_state(self.data)

    def _changes(self, state: Mapping[str, Any], *, accept: bool) -> dict[str, str]:
        """Say what is no longer as it was when the state was saved; see `data_changes`.

        Raises DataError for a changed training set that is not accepted.
        """
        earlier = json.loads(state["recorder"]["directory"]["info"])
        changes = data_changes(self.data, earlier["data"], state.get("data"))
        check_training_set(changes, f"the run in {self.directory}", accept=accept)
        return changes

    def _planned(self, state: Mapping[str, Any] | None) -> int:
        """Return how many iterations the run has: those that it had, and those that are left."""
        each, epochs = self.data.batches_per_epoch, self.config.epochs
        if state is None:
            return each * epochs
        steps, position = int(state["recorder"]["steps"]), state["position"]
        epoch, batch = int(position["epoch"]), int(position["batch"])
        left = max(0, each - batch) + each * (epochs - epoch - 1)
        return steps + max(0, left)

    def _build_model(self) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(
            config.model,
            num_classes=len(self.data.classes),
            norm=config.norm,
            stem=config.stem,
        )
        layers = len(convolutions(model))
        if config.feature_map_layer is not None and config.feature_map_layer >= layers:
            raise ConfigurationError(
                f"feature_map_layer is {config.feature_map_layer}; {config.model} has "
                f"{layers} convolutions, counted from 0"
            )
        images, _, _ = self.data.sample_images(min(2, self.data.test_size))
        try:
            with torch.no_grad():
                model.eval()(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            size = self.data.image_size
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"{config.model} cannot take images of {size}×{size}: {reason}; set image_size"
            ) from None
        model.train()
        if config.batch_size < 2 * config.accumulate * self.world.size:
            _check_single_images(model, images[:1], config)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not config.deterministic
            model.to(self.device).to(memory_format=torch.channels_last)
        return model

    def check_space(self, *, new: bool) -> None:
        """Raise RunDirectoryError unless the disk can be written, and has room for the run."""
        needed = self.disk_bytes() if new else self._checkpoint_bytes()
        place = next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            why = "its disk is read-only" if read_only else f"no permission to write in {place}"
            raise RunDirectoryError(
                f"{self.directory}: cannot be written: {why}; name another directory"
            )
        free = shutil.disk_usage(place).free
        if needed > free:
            raise NoSpaceError(
                f"{self.directory}: the run needs about {needed / 1e6:,.0f} MB, and "
                f"{free / 1e6:,.0f} MB are free; make room, or name a place on another disk with "
                "`directory=DIR`"
            )

    def disk_bytes(self) -> int:
        """Return about how much the run will write, at most."""
        layers = convolutions(self.model).values()
        filters = sum(layer.out_channels for layer in layers)
        thinned = self._record_every() > 1
        stored = 3 * filters * (3 if thinned else 1) + 512
        rows = math.ceil(self.iterations / self._record_every())
        each_iteration = 4 * (6 * len(layers) + 10)
        return (
            (KEPT + 1) * self._checkpoint_bytes()
            + 4 * stored * rows
            + each_iteration * self.iterations
        )

    def _checkpoint_bytes(self) -> int:
        weights: int = sum(p.numel() * p.element_size() for p in self.model.state_dict().values())
        return 2 * weights + 200 * sum(c.out_channels for c in convolutions(self.model).values())

    def _record_every(self) -> int:
        default: int = self.settings.get("record_every") or default_record_every(self.iterations)
        return self.config.record_every or default

    def _min_spell(self) -> int:
        default: int = self.settings.get("min_spell") or max(1, round(self.iterations / 1000))
        return self.config.min_spell or default

    def record(
        self, *, force: bool, command: Sequence[str] | None, resume: ResumePoint | None
    ) -> None:
        """Create the run directory, or go on from a checkpoint; attach the recorder."""
        config = self.config
        state = resume.state if resume is not None else None
        here = {
            "environment": self._environment(),
            "amp": self.amp.value,
            "cuda_graph": self.captured,
        }
        info: dict[str, Any] = {"config": config.to_mapping(), **here}
        if state is None:
            info["model"] = config.model
            info["command"] = list(command) if command is not None else None
        if self.world.first and (state is None or self.changes):
            info |= {
                "data": self.data.description(),
                "planned_iterations": self.iterations,
                "iterations_per_epoch": self.data.batches_per_epoch,
            }
        try:
            if state is not None:
                earlier = json.loads(state["recorder"]["directory"]["info"])
                self._load(state, earlier.get("iterations_per_epoch"))
                if self.changes:
                    info["changed_data"] = [
                        *earlier.get("changed_data", ()),
                        {"iteration": state["recorder"]["steps"], **self.changes},
                    ]
                steps = [*earlier.get("resumed_from", ()), state["recorder"]["steps"]]
                info["resumed_from"] = steps
                self.bad_images = {each["path"]: each for each in earlier.get("bad_images", ())}
            self.recorder = FilterRecorder(
                self.model,
                self.directory,
                optimizer=self.optimizer,
                record_every=self._record_every(),
                min_spell=self._min_spell(),
                stop_when_diverged=True,
                info=info,
                resume=state["recorder"] if state is not None else None,
                force=force or resume is not None,
            )
        except _MISFITS as error:
            if state is None or isinstance(error, PgtDiagError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise RunDirectoryError(
                f"{self.directory}: its checkpoint does not fit this run: {reason}"
            ) from None
        self._saved = time.monotonic()
        if resume is not None and resume.checkpoint is not None and self.world.first:
            try:
                checkpoint.set_aside_newer(self.directory, resume.checkpoint)
            except BaseException as error:
                self.recorder.close("failed", f"{type(error).__name__}: {error}")
                raise

    def _load(self, state: Mapping[str, Any], earlier_each: int | None) -> None:
        """Load a checkpoint; earlier_each: how many iterations an epoch of its data had."""
        self.model.load_state_dict(state["model"])
        self._load_optimizer(state["optimizer"], state["recorder"]["steps"])
        self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
        position = state["position"]
        self.position = _Position(
            epoch=int(position["epoch"]),
            batch=int(position["batch"]),
            sums=position["sums"].to(self.position.sums),
        )
        each = self.data.batches_per_epoch if earlier_each is None else earlier_each
        done = self.position.epoch * each + self.position.batch + position.get("extra", 0)
        if done != state["recorder"]["steps"] or self.position.epoch > self.config.epochs:
            raise ValueError(f"it is not of step {state['recorder']['steps']}")
        metrics = str(state["recorder"]["directory"]["metrics"])
        if metrics and metrics.partition("\n")[0].split(",") != list(EPOCH_COLUMNS):
            raise ValueError("its metrics have other columns")
        # Nothing from here to the first iteration may draw from these.
        if self.world.rank < len(state["random"]):
            random = state["random"][self.world.rank]
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and random["cuda"] is not None:
                torch.cuda.set_rng_state(random["cuda"], self.device)

    def _load_optimizer(self, state: Mapping[str, Any], steps: int) -> None:
        """Load its state; ValueError for one that a step would fail with, or train otherwise."""
        options = list(map(_options, self.optimizer.param_groups))
        self.optimizer.load_state_dict(dict(state))
        if list(map(_options, self.optimizer.param_groups)) != options:
            raise ValueError("its optimizer has other options")
        shapes = {
            parameter: momentum.shape
            for parameter, buffers in self.optimizer.state.items()
            if (momentum := buffers.get("momentum_buffer")) is not None
        }
        wanted = {p: p.shape for group in self.optimizer.param_groups for p in group["params"]}
        if shapes != wanted and (shapes or (steps and self.config.momentum)):
            raise ValueError("its momentum is of other weights")

    def _save_checkpoint(self, kept: int = KEPT) -> None:
        recorder = self.recorder.state_dict()
        self._check_divergence()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        random = self.world.gather({"cpu": torch.get_rng_state(), "cuda": cuda})
        self._saved = time.monotonic()
        if not self.world.first:
            return
        checkpoint.save(
            self.directory,
            self.recorder.steps,
            {
                "config": self.config.to_mapping(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random,
                "position": self.position.state_dict(
                    self.recorder.steps, self.data.batches_per_epoch
                ),
                "data": self.data_state,
                "meter": self.meter.state_dict(self.recorder.seconds),
                "recorder": recorder,
            },
            kept,
        )
        self._saved = time.monotonic()

    def _save_when_due(self, stop: Callable[[], bool]) -> None:
        """Write a checkpoint now and then, and before stopping when asked to.

        Raises DivergedError when the recorder has found that the loss was NaN or infinite.
        """
        waited = time.monotonic() - self._saved > _CHECKPOINT_SECONDS
        failed = self.recorder.diverged_at is not None
        stopping, due, failed = self.world.exchange([stop(), waited, failed])
        if failed:
            self._check_divergence()
        if every := self.config.checkpoint_every:
            due = self.recorder.steps % every == 0
        if due or stopping:
            self._save_checkpoint()
        if stopping:
            raise KeyboardInterrupt

    def _training_step(self, listener: Listener) -> TrainingStep:
        def capture_failed(reason: str) -> None:
            if self.config.cuda_graph is CudaGraph.ON:
                raise ConfigurationError(
                    f"cuda_graph is on and the step cannot be captured: {reason}; use auto or off"
                )
            self.recorder.update_info({"cuda_graph": False})
            listener.noted(f"the step cannot be captured as a CUDA graph: {reason}")

        return TrainingStep(
            self.config,
            self.model,
            self.optimizer,
            self.recorder,
            prepare=self.data.prepare,
            capture=CudaCapture(self.device) if self.captured else None,
            capture_failed=capture_failed,
            scaler=self.scaler,
            world=self.world,
            amp=self.amp,
            directory=self.directory,
        )

    def run(
        self,
        listener: Listener,
        stop: Callable[[], bool],
        resume: ResumePoint | None,
        busy: threading.Event,
    ) -> Path:
        status: Ending = "failed"
        message: str | None = None
        try:
            listener.started(self.plan(resume))
            self.step = self._training_step(listener)
            self._run_epochs(listener, stop, busy)
            status = "finished"
        except KeyboardInterrupt:
            status, message = "interrupted", "stopped by the user"
            raise
        except DivergedError as error:
            status, message = "diverged", str(error)
            raise
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            if is_of_a_peer(error):
                message = "another process of this run ended"
            raise
        finally:
            self.data.close()
            self.recorder.close(status, message)
        return self.directory

    def _record_bad_images(self, listener: Listener) -> None:
        """Put the images that others were used for into run.json."""
        everybody = self.world.gather(self.data.bad_images)
        found = {image.path: asdict(image) for images in everybody for image in images}
        if not found.keys() <= self.bad_images.keys():
            self.bad_images = dict(sorted({**self.bad_images, **found}.items()))
            self.recorder.update_info({"bad_images": list(self.bad_images.values())})
            listener.replaced_images(list(self.bad_images))

    def plan(self, resume: ResumePoint | None) -> Plan:
        done = epoch = 0
        notes = self.data.notes
        if self.world.size > 1 and self.config.norm is Norm.BATCH:
            notes += ("batch norm takes its statistics from each process's share of a batch",)
        if resume is not None:
            notes += tuple(f"not used: {problem}" for problem in resume.damaged)
            if resume.state is not None:
                done = int(resume.state["recorder"]["steps"])
                epoch = int(resume.state["position"]["epoch"])
                notes += self._differences(resume.state)
                notes += tuple(map(_changed, self.changes.items()))
        return Plan(
            directory=self.directory,
            config=self.config,
            data=self.data.name,
            train_images=self.data.train_size,
            test_images=self.data.test_size,
            image_size=self.data.image_size,
            classes=len(self.data.classes),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            filters=sum(layer.out_channels for layer in convolutions(self.model).values()),
            device=environment(self.device)["device"],
            processes=self.world.size,
            amp=self.amp,
            iterations=self.iterations,
            done=done,
            resumed=resume is not None,
            epoch=epoch,
            recorded=resume.recorded if resume is not None else None,
            disk_bytes=self.disk_bytes(),
            notes=notes,
        )

    def _environment(self) -> dict[str, Any]:
        return {**environment(self.device), "processes": self.world.size}

    def _differences(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Say what is no longer as it was, and keeps the result from being exact to the bit."""
        earlier = json.loads(state["recorder"]["directory"]["info"])
        before = {**earlier["environment"], "amp": earlier["amp"]}
        now = {**self._environment(), "amp": self.amp.value}
        return tuple(
            f"{key} was {before.get(key)}, and is {now[key]} now: the result will be close to that "
            "of an undisturbed run, not the same to the bit"
            for key in ("torch", "device", "threads", "amp", "processes")
            if before.get(key) != now[key]
        )

    def _run_epochs(
        self, listener: Listener, stop: Callable[[], bool], busy: threading.Event
    ) -> None:
        steps = self.recorder.steps
        snapshots = {step for step in self._snapshot_iterations() if step >= steps}
        meter, position = self.meter, self.position
        meter.start(steps)
        if self.world.from_first(lambda: not checkpoint.found_in(self.directory)):
            self._save_checkpoint()
        while position.epoch < self.config.epochs:
            meter.start_epoch(self.recorder.seconds)
            for parts in self.data.raw_batches(position.epoch, position.batch):
                if self.recorder.steps in snapshots:
                    self._snapshot()
                    snapshots.discard(self.recorder.steps)
                position.sums += self._step(parts)
                position.batch += 1
                if busy.is_set():
                    busy.clear()
                    listener.noted(_BUSY)
                listener.iterated(meter.progress(position.epoch, self.recorder))
                self._save_when_due(stop)
            metrics = meter.finish_epoch(position.sums, position.batch, self.recorder)
            self.recorder.flush()
            self._check_divergence()
            test_loss, test_accuracy = self._evaluate(stop)
            if not math.isfinite(test_loss):
                last = self.recorder.iterations - 1
                raise DivergedError(
                    f"the test loss is NaN or infinite after iteration {last}; iterations 0 to "
                    f"{last} are recorded in {self.directory}; {REMEDY}"
                )
            values = (
                position.epoch,
                self.recorder.iterations,
                metrics.loss,
                metrics.accuracy,
                test_loss,
                test_accuracy,
                self._learning_rate(back=1),
                metrics.seconds,
                metrics.images_per_second,
                metrics.recorder_seconds,
                self.recorder.dead_filters,
            )
            row = dict(zip(EPOCH_COLUMNS, values, strict=True))
            self.recorder.log_epoch(row)
            position.next_epoch()
            meter.next_epoch()
            listener.finished_epoch(row)
            self._record_bad_images(listener)
        if self.recorder.steps in snapshots:
            self._snapshot()
        self._save_checkpoint(kept=1)

    def _step(self, parts: Sequence[Tensor]) -> Tensor:
        return self.step(parts, self._learning_rate())

    def _learning_rate(self, back: int = 0) -> float:
        """Return that of the coming iteration, or of one before it."""
        # By epochs, not by steps: where the data has changed, an epoch had more of them, or fewer.
        each = self.data.batches_per_epoch
        place = self.position.epoch * each + min(self.position.batch, each)
        return learning_rate(self.config, place - back, each)

    @torch.no_grad()
    def _evaluate(self, stop: Callable[[], bool]) -> tuple[float, float]:
        """Return loss and accuracy (percent) over every test image."""
        self.model.eval()
        # Batch norm's running statistics, which every process has of its own images.
        self.world.copy_first_(self.model.buffers())
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for images, target in self.data.test_batches():
            with autocast(self.device, self.amp):
                logits = self.model(images).float()
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            correct = (logits.argmax(1) == target).sum()
            sums += torch.stack((loss.double(), correct.double()))
            if any(self.world.exchange([stop()])):
                self._save_checkpoint()
                raise KeyboardInterrupt
        self.model.train()
        self.world.sum_(sums)
        loss_sum, correct_sum = (sums / self.data.test_size).tolist()
        return loss_sum, 100 * correct_sum

    def _check_divergence(self) -> None:
        at = self.world.from_first(lambda: self.recorder.diverged_at)
        if at is not None:
            raise diverged(at, self.directory)

    def _snapshot(self) -> None:
        if not self.world.first:
            return
        config = self.config
        count = min(config.feature_map_images, self.data.test_size)
        images, originals, target = self.data.sample_images(count)
        labels = [self.data.classes[index] for index in target.tolist()]
        layer = config.feature_map_layer
        if layer is None:
            layer = min(1, len(convolutions(self.model)) - 1)
        self.recorder.snapshot(layer, images, originals, labels)

    def _snapshot_iterations(self) -> list[int]:
        """Spread the snapshots quadratically from start to end: filters die early."""
        count = self.config.feature_map_snapshots
        shares = np.linspace(0, 1, count) ** 2 if count > 1 else np.ones(count)
        return [int(iteration) for iteration in np.unique((shares * self.iterations).round())]
