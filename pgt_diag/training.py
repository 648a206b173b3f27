"""The training loop: one run from its configuration to a sealed run directory."""

import math
import os
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import pgt_diag
from pgt_diag.activations import convolutions
from pgt_diag.clipping import adaptive_clip_grad_, agc_parameters
from pgt_diag.config import Amp, Device, RunConfig
from pgt_diag.data import load_data
from pgt_diag.directory import check_vacant
from pgt_diag.encoder import STORED_ROWS
from pgt_diag.errors import ConfigurationError, DivergedError
from pgt_diag.models import build_model
from pgt_diag.powergrad import PowerGradCrossEntropyLoss
from pgt_diag.progress import Listener, Meter, Plan
from pgt_diag.recorder import FilterRecorder, Status
from pgt_diag.schedules import learning_rate


def train(
    config: RunConfig,
    directory: str | Path,
    *,
    listener: Listener | None = None,
    download: bool = False,
    force: bool = False,
    command: Sequence[str] | None = None,
) -> Path:
    """Train and record one run in `directory`; return its path.

    Raises ConfigurationError, DataError or RunDirectoryError before anything is written, and
    DivergedError when the loss becomes NaN or infinite. However it ends, what was recorded is on
    disk and readable, and run.json says how it ended.
    """
    directory = Path(directory)
    check_vacant(directory, force=force)
    session = _Session(config, directory, download=download)
    session.record(force=force, command=command)
    return session.run(listener or Listener())


def plan(
    config: RunConfig, directory: str | Path, *, download: bool = False, force: bool = False
) -> Plan:
    """Return what `train` would do, having checked everything it checks, and write nothing."""
    check_vacant(Path(directory), force=force)
    return _Session(config, Path(directory), download=download).plan()


def resolve_device(device: Device) -> torch.device:
    """Return the torch device; ConfigurationError when a GPU is asked for and absent."""
    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ConfigurationError("device is cuda and torch sees no CUDA GPU; use cpu or auto")
    return torch.device(device.value)


def resolve_amp(amp: Amp, device: torch.device) -> Amp:
    """Return the precision used: bf16 on CUDA unless asked otherwise, and float32 on CPU.

    On CPUs bf16 is slower, and on some its convolutions give other gradients at every run.
    """
    if amp is Amp.AUTO:
        return Amp.BF16 if device.type == "cuda" else Amp.OFF
    if amp is not Amp.OFF and device.type == "cpu":
        raise ConfigurationError(f"amp is {amp} and there is no GPU to use it; use off or auto")
    return amp


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.SGD:
    """Return the paper's SGD; weight decay leaves vectors alone unless `decay_biases`.

    Source: Section 4 of the paper; the authors' code for the tensors that decay.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 or config.decay_biases]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1 and not config.decay_biases]},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the hardware that a result depends on."""
    return {
        "pgt_diag": pgt_diag.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


_REMEDY = "try a lower lr, a longer warmup_epochs, or method gc or agc"


class _Session:
    """The objects of one run."""

    recorder: FilterRecorder

    def __init__(self, config: RunConfig, directory: Path, *, download: bool) -> None:
        self.config = config
        self.directory = directory
        self.device = resolve_device(config.device)
        self.amp = resolve_amp(config.amp, self.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.data = load_data(config, device=self.device, download=download)
        self.iterations = self.data.batches_per_epoch * config.epochs
        self.model = self._build_model()
        self.optimizer = build_optimizer(self.model, config)
        self.agc_parameters = agc_parameters(self.model, config.agc_classifier)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is Amp.FP16)
        self.loss = PowerGradCrossEntropyLoss(
            alpha=config.alpha if config.method.uses_pgt else 1.0,
            label_smoothing=config.label_smoothing,
        )

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
        images, _, _ = self.data.sample_images(2)
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
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            model.to(self.device).to(memory_format=torch.channels_last)
        return model

    def record(self, *, force: bool, command: Sequence[str] | None) -> None:
        """Create the run directory and attach the recorder."""
        config = self.config
        self.recorder = FilterRecorder(
            self.model,
            self.directory,
            optimizer=self.optimizer,
            record_every=config.record_every or math.ceil(self.iterations / STORED_ROWS),
            min_spell=config.min_spell or max(1, round(self.iterations / 1000)),
            stop_when_diverged=True,
            info={
                "model": config.model,
                "config": config.to_mapping(),
                "command": list(command) if command is not None else None,
                "data": self.data.description(),
                "planned_iterations": self.iterations,
                "iterations_per_epoch": self.data.batches_per_epoch,
                "amp": self.amp.value,
                "environment": environment(self.device),
            },
            force=force,
        )

    def run(self, listener: Listener) -> Path:
        status: Status = "failed"
        message: str | None = None
        try:
            listener.started(self.plan())
            self._run_epochs(listener)
            status = "finished"
        except KeyboardInterrupt:
            status, message = "interrupted", "stopped by the user"
            raise
        except DivergedError as error:
            status, message = "diverged", str(error)
            raise
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.recorder.close(status, message)
        return self.directory

    def plan(self) -> Plan:
        return Plan(
            directory=self.directory,
            config=self.config,
            data=self.data.name,
            train_images=self.data.train_size,
            test_images=self.data.test_size,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            filters=sum(layer.out_channels for layer in convolutions(self.model).values()),
            device=environment(self.device)["device"],
            amp=self.amp,
            iterations=self.iterations,
        )

    def _run_epochs(self, listener: Listener) -> None:
        snapshots = set(self._snapshot_iterations())
        meter = Meter(self.config.batch_size, self.data.batches_per_epoch, self.config.epochs)
        for epoch in range(self.config.epochs):
            sums = torch.zeros(2, device=self.device, dtype=torch.float64)
            meter.start_epoch(self.recorder.seconds)
            for images, target in self.data.train_batches(epoch):
                if self.recorder.steps in snapshots:
                    self._snapshot()
                    snapshots.discard(self.recorder.steps)
                sums += self._step(images, target)
                self._check_divergence()
                listener.iterated(meter.progress(epoch, self.recorder))
            metrics = meter.finish_epoch(sums, self.recorder)
            self.recorder.flush()
            self._check_divergence()
            test_loss, test_accuracy = self._evaluate()
            if not math.isfinite(test_loss):
                last = self.recorder.iterations - 1
                raise DivergedError(
                    f"the test loss is NaN or infinite after iteration {last}; iterations 0 to "
                    f"{last} are recorded in {self.directory}; {_REMEDY}"
                )
            row = {
                "epoch": epoch,
                "iteration": self.recorder.iterations,
                "train_loss": metrics.loss,
                "train_accuracy": metrics.accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": metrics.seconds,
                "images_per_second": metrics.images_per_second,
                "recorder_seconds": metrics.recorder_seconds,
                "dead_filters": self.recorder.dead_filters,
            }
            self.recorder.log_epoch(row)
            listener.finished_epoch(row)
        if self.recorder.steps in snapshots:
            self._snapshot()

    def _step(self, images: Tensor, target: Tensor) -> Tensor:
        """Make one iteration; return (Σ loss, correct predictions) of the batch, on the device."""
        lr = learning_rate(self.config, self.recorder.steps, self.data.batches_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            logits = self.model(images)
            loss = self.loss(logits, target)
        if self.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self._diverged(self.recorder.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self._clip()
        correct = (logits.detach().argmax(1) == target).sum()
        loss = loss.detach()
        self.recorder.log(loss=loss, accuracy=100 * correct / len(target))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack((loss.double() * len(target), correct.double()))

    def _clip(self) -> None:
        config = self.config
        if config.method.uses_gc:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            # The factor clip_grad_norm_ applied, by its own formula.
            coefficient = (config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            self.recorder.log(grad_norm_before_clip=norm, clip_coefficient=coefficient)
        if config.method.uses_agc:
            factors = adaptive_clip_grad_(
                self.agc_parameters, config.agc_clip_factor, config.agc_eps
            )
            ids = map(id, self.agc_parameters)
            by_parameter = dict(zip(ids, factors, strict=True))
            self.recorder.log(
                clip_factors={
                    name: by_parameter[id(weight)]
                    for name, weight in self.recorder.convolution_weights
                    if id(weight) in by_parameter
                }
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self.amp is Amp.FP16 else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp is not Amp.OFF)

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Return loss and accuracy (percent) over every test image."""
        self.model.eval()
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for images, target in self.data.test_batches():
            with self._autocast():
                logits = self.model(images).float()
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            correct = (logits.argmax(1) == target).sum()
            sums += torch.stack((loss.double(), correct.double()))
        self.model.train()
        loss_sum, correct_sum = (sums / self.data.test_size).tolist()
        return loss_sum, 100 * correct_sum

    def _check_divergence(self) -> None:
        if self.recorder.diverged_at is not None:
            raise self._diverged(self.recorder.diverged_at)

    def _diverged(self, iteration: int) -> DivergedError:
        recorded = f"iterations 0 to {iteration - 1} are" if iteration else "nothing is"
        return DivergedError(
            f"the loss became NaN or infinite at iteration {iteration}; {recorded} recorded in "
            f"{self.directory}; {_REMEDY}"
        )

    def _snapshot(self) -> None:
        config = self.config
        images, originals, target = self.data.sample_images(config.feature_map_images)
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
