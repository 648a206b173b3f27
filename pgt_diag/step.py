"""One iteration of training: forward and backward, clipping, the optimizer's step."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pgt_diag.clipping import agc_parameters, clip_filters_, clip_global_norm_
from pgt_diag.config import Amp, RunConfig
from pgt_diag.distributed import World
from pgt_diag.errors import DivergedError
from pgt_diag.graph import Capture, GraphedStep
from pgt_diag.powergrad import PowerGradCrossEntropyLoss
from pgt_diag.recorder import FilterRecorder
from pgt_diag.sgd import MeasuringSGD

REMEDY = "try a lower lr, a longer warmup_epochs, or method gc or agc"


def build_optimizer(model: nn.Module, config: RunConfig) -> MeasuringSGD:
    """Return the paper's SGD; weight decay leaves vectors alone unless `decay_biases`.

    Source: Section 4 of the paper; the authors' code for the tensors that decay.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 or config.decay_biases]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1 and not config.decay_biases]},
    ]
    optimizer = MeasuringSGD(
        [group for group in groups if group["params"]],
        lr=config.peak_lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    if config.momentum:
        # A fused first step that a GradScaler skips would leave what memory held as momentum.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def autocast(device: torch.device, amp: Amp) -> AbstractContextManager[Any]:
    """Return the context that a forward pass is made in."""
    dtype = torch.float16 if amp is Amp.FP16 else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp is not Amp.OFF)


def diverged(iteration: int, directory: Path) -> DivergedError:
    """Return the error for a loss that became NaN or infinite at `iteration`."""
    recorded = f"iterations 0 to {iteration - 1} are" if iteration else "nothing is"
    return DivergedError(
        f"the loss became NaN or infinite at iteration {iteration}; {recorded} recorded in "
        f"{directory}; {REMEDY}"
    )


class TrainingStep:
    """Makes iterations of one run, and tells its recorder what only the loop knows."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recorder: FilterRecorder,
        *,
        prepare: Callable[..., tuple[Tensor, Tensor]],
        scaler: torch.amp.GradScaler,
        world: World,
        amp: Amp,
        directory: Path,
        capture: Capture | None = None,
        capture_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._model = model
        self._parallel = world.parallel(model)
        self._world = world
        self._optimizer = optimizer
        self._recorder = recorder
        self._scaler = scaler
        self._device = world.device
        self._prepare = prepare
        self._amp = amp
        self._directory = directory
        self._make: Callable[..., Tensor] = self._iterate
        self._lr: Tensor | None = None
        if capture is not None:
            # A number would be captured as it is.
            self._lr = torch.zeros((), device=self._device)
            for group in optimizer.param_groups:
                group["lr"] = self._lr
            self._make = GraphedStep(
                self._iterate, capture, replayed=recorder.replayed, failed=self._give_up_capture
            )
        self._capture_failed = capture_failed
        self._agc_parameters = agc_parameters(model, config.agc_classifier)
        self._loss = PowerGradCrossEntropyLoss(
            alpha=config.alpha if config.method.uses_pgt else 1.0,
            label_smoothing=config.label_smoothing,
        )

    def __call__(self, parts: Sequence[Tensor], lr: float) -> Tensor:
        """Make one iteration; return (Σ loss, correct predictions) of the batch, on the device.

        parts: this process's share of a raw batch, as `ImageData.raw_batches` yields it. The result
        is (2,) float64, of the whole batch; the next iteration may overwrite it.

        Raises DivergedError, on a CPU, when the loss is NaN or infinite; the weights are as before.
        """
        if self._lr is not None:
            self._lr.fill_(lr)
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        return self._make(*parts)

    def _iterate(self, *raw: Tensor) -> Tensor:
        images, target = self._prepare(*raw)
        if self._device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        count = self._config.accumulate
        parts = list(zip(images.chunk(count), target.chunk(count), strict=True))
        for index, (part, part_target) in enumerate(parts):
            with self._averaging(last=index == len(parts) - 1):
                sums += self._accumulate(part, part_target)
        self._world.sum_(sums)
        waits = self._device.type == "cpu" and self._lr is None
        if waits and not math.isfinite(sums[0]):
            raise diverged(self._recorder.steps, self._directory)
        self._scaler.unscale_(self._optimizer)
        self._clip()
        loss, correct = sums / self._config.batch_size
        self._recorder.log(loss=loss, accuracy=100 * correct)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return sums

    def _give_up_capture(self, reason: str) -> None:
        if self._scaler.is_enabled():
            # The gradients it has unscaled were never there.
            self._scaler.update(self._scaler.get_scale())
        self._capture_failed(reason)

    def _averaging(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return a part's context: only in the last one the processes exchange gradients."""
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return nullcontext()
        return self._parallel.no_sync()

    def _accumulate(self, images: Tensor, target: Tensor) -> Tensor:
        """Add the gradient of the batch's mean loss that a part of it makes; return its sums."""
        with autocast(self._device, self._amp):
            logits = self._parallel(images)
            loss = self._loss(logits, target)
        # What the processes have is averaged, so that their shares add up to their number.
        share = len(target) * self._world.size / self._config.batch_size
        self._scaler.scale(loss if share == 1 else loss * share).backward()
        correct = (logits.detach().argmax(1) == target).sum()
        return torch.stack((loss.detach().double() * len(target), correct.double()))

    def _clip(self) -> None:
        config = self._config
        if config.method.uses_gc:
            norm = clip_global_norm_(self._model.parameters(), config.clip_norm)
            # The factor that was applied, by torch's own formula.
            coefficient = (config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            self._recorder.log(grad_norm_before_clip=norm, clip_coefficient=coefficient)
        if config.method.uses_agc:
            factors, norms = clip_filters_(
                self._agc_parameters, config.agc_clip_factor, config.agc_eps
            )
            places = {id(each): index for index, each in enumerate(self._agc_parameters)}
            clipped = {
                name: places[id(weight)]
                for name, weight in self._recorder.convolution_weights
                if id(weight) in places
            }
            self._recorder.log(
                clip_factors={name: factors[index] for name, index in clipped.items()},
                gradient_norms={name: norms[index] for name, index in clipped.items()},
            )
