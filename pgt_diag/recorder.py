"""FilterRecorder: hooks that measure every convolution's filters at every iteration.

The hooks reduce at once and keep no tensor. Results go to a ring of rows on the device, one row
per optimizer step; half of it at a time is copied beside the training stream and encoded by a
thread. Nothing in the step waits for the device.
"""

import difflib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pgt_diag.activations import ActivationFinder, Call, Tap, convolutions
from pgt_diag.errors import ConfigurationError, RecorderError
from pgt_diag.filters import COLLAPSED_RATIO, ZEROED_RATIO
from pgt_diag.reductions import Reading, filter_norms, read_map, read_map_and_gap
from pgt_diag.ring import Ring, RowLayout
from pgt_diag.run import Layer, RunDirectory
from pgt_diag.writer import SCALARS, TraceEncoder, WriterThread, layer_slices

_HANDOVER_SECONDS = 1.0
Status = Literal["finished", "interrupted", "diverged", "failed"]


class FilterRecorder:
    """Records every convolution of a model while somebody's loop trains it.

    ```python
    recorder = pgt_diag.FilterRecorder(model, "runs/mine", optimizer=optimizer)
    with recorder:
        ...  # your training loop, unchanged
    ```

    An iteration is one `optimizer.step()` that changed the weights, counted from 0. Per iteration
    it records each filter's weight norm (after the step), gradient norm (as the optimizer got it)
    and whether its channel was silent on the batch (on all its micro-batches, if several were
    accumulated), and the norm over the batch of each GAP feature: the spatial mean of the last
    convolution's post-activation map, or of the output of the module named `gap_module`.

    Arguments:
        model: the module whose `forward` the loop calls; with DDP, the module inside.
        directory: the run directory to create.
        optimizer: the optimizer that updates the model's weights.
        taps: name by hand which module's output is the post-activation map of a convolution,
            `{"conv1": "relu"}`; the others are found from the first forward pass.
        record_every: store norms every so many iterations with each window's extremes; by default
            all of the first few thousand, then ever fewer. Events are exact all the same.
        min_spell: log a state from this many iterations on; shorter spells are only counted.
        collapsed_ratio, zeroed_ratio: the norm thresholds of these states, relative to the start.
        stop_when_diverged: take a NaN or infinite loss, told by `log`, for the end: that iteration
            and later ones are not recorded, and `diverged_at` names it.
        info: more entries for run.json, plain JSON values.
        force: replace a run that the directory already holds.

    Raises:
        ConfigurationError: the model has no convolution, or a name is unknown.
        RunDirectoryError: the directory already holds a run.
        RecorderError: at a step that no training forward pass of `model` preceded.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | Path,
        *,
        optimizer: torch.optim.Optimizer,
        taps: dict[str, str] | None = None,
        gap_module: str | None = None,
        record_every: int | None = None,
        min_spell: int = 1,
        collapsed_ratio: float = COLLAPSED_RATIO,
        zeroed_ratio: float = ZEROED_RATIO,
        stop_when_diverged: bool = False,
        info: dict[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._convolutions = convolutions(model)
        if not self._convolutions:
            raise ConfigurationError(f"{type(model).__name__} has no convolution to record")
        self._check_names(self._convolutions, taps or ())
        self._check_names(self._modules, [*(taps or {}).values(), *filter(None, [gap_module])])
        weights = [module.weight for module in self._convolutions.values()]
        self._device = weights[0].device
        self._layers = layer_slices(
            list(self._convolutions), [weight.shape[0] for weight in weights]
        )
        self._named_taps = taps or {}
        self._gap_module = gap_module
        self._optimizer = optimizer
        self._min_spell, self._record_every = min_spell, record_every
        self._ratios = (collapsed_ratio, zeroed_ratio)
        self._stop_when_diverged = stop_when_diverged
        self._directory = RunDirectory.create(Path(directory), force=force)
        self._info = {
            "model": type(model).__name__,
            "record_every": record_every,
            "min_spell": min_spell,
            "collapsed_ratio": collapsed_ratio,
            "zeroed_ratio": zeroed_ratio,
            **(info or {}),
        }
        self._initial_norms = torch.empty(self._layers.offsets[-1], device=self._device)
        self._write_weight_norms(self._initial_norms)
        self._convolution_ids = {id(weight) for weight in weights}

        self._handles: list[RemovableHandle] = []
        self._tap_handles: list[RemovableHandle] = []
        self._finder: ActivationFinder | None = None
        self._calls: dict[tuple[str, str], int] = {}
        self._capture: tuple[int, list[Tensor]] | None = None
        self._recording = False
        self._seen_forward = False
        self._ring: Ring | None = None
        self._writer: WriterThread | None = None
        self._handed_over = time.monotonic()
        self._steps = 0
        self._told: dict[str, Any] = {}
        self.seconds = 0.0
        """Time that recording has taken on the training thread, seconds."""
        self._started = time.perf_counter()
        self._attach()

    # What a training loop calls

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        status: Status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.close(status, message=f"{kind.__name__}: {error}")

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def steps(self) -> int:
        """How many optimizer steps were seen, those that a GradScaler skipped among them."""
        return self._steps

    @property
    def convolution_weights(self) -> list[tuple[str, Tensor]]:
        """The recorded convolutions' names and weights."""
        return [(name, module.weight) for name, module in self._convolutions.items()]

    @property
    def iterations(self) -> int:
        """How many iterations the writer has seen; all of them after `flush`."""
        return self._writer.encoder.iterations if self._writer else 0

    @property
    def dead_filters(self) -> int:
        """How many filters are dead as far as the writer has come: a second or so ago."""
        return self._writer.encoder.dead_filters if self._writer else 0

    @property
    def latest(self) -> tuple[float, float]:
        """The loss and the accuracy (percent) of the last iteration the writer has seen."""
        return self._writer.encoder.latest if self._writer else (math.nan, math.nan)

    @property
    def diverged_at(self) -> int | None:
        """The iteration whose loss was NaN or infinite, if `stop_when_diverged` found one."""
        return self._writer.encoder.diverged_at if self._writer else None

    def log(
        self,
        *,
        loss: Tensor | float | None = None,
        accuracy: Tensor | float | None = None,
        grad_norm_before_clip: Tensor | float | None = None,
        clip_coefficient: Tensor | float | None = None,
        clip_factors: dict[str, Tensor] | None = None,
    ) -> None:
        """Add what only the loop knows to the coming step's row; call it before `step()`.

        Tensors are taken as they are on the device, without waiting for it. `accuracy` is a
        percentage, `clip_factors` maps convolutions to (filters,) factors in [0, 1].
        """
        told = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm_before_clip": grad_norm_before_clip,
            "clip_coefficient": clip_coefficient,
            "clip_factors": clip_factors,
        }
        self._told |= {name: value for name, value in told.items() if value is not None}

    def log_epoch(self, values: dict[str, Any]) -> None:
        """Append one row to metrics.csv; the first call decides the columns."""
        self._directory.append_metrics(values)

    def snapshot(
        self, layer: int, images: Tensor, originals: Tensor, labels: Iterable[str]
    ) -> None:
        """Store the post-activation maps of convolution `layer` for fixed images.

        images: (n, 3, H, W) float, as the model takes them, in eval mode and without autocast;
        originals: (n, 3, H, W) uint8, to be shown beside the maps.
        """
        began = time.perf_counter()
        captured: list[Tensor] = []
        training = self.model.training
        self.model.eval()
        self._capture = (layer, captured)
        try:
            images = images.to(self._device)
            if self._ring is None:
                # The first forward pass of all finds the taps, from its autograd graph.
                with torch.enable_grad():
                    self.model(images)
            captured.clear()
            with torch.no_grad():
                self.model(images)
        finally:
            self._capture = None
            self.model.train(training)
        self.flush()
        self._directory.write_feature_maps(
            self.iterations, self._layers.names[layer], captured[0], originals, list(labels)
        )
        self.seconds += time.perf_counter() - began

    def flush(self) -> None:
        """Wait until every iteration so far is on disk, to be read from the run directory."""
        self._hand_over()
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: Status = "finished", message: str | None = None) -> None:
        """Take the hooks off, write everything, seal the run; further calls do nothing."""
        if not self._handles:
            return
        self._detach()
        try:
            self._hand_over()
            if self._writer is not None:
                self._writer.close()
        except BaseException as error:
            self._directory.finish("failed", f"recording stopped: {error}")
            raise
        self._directory.update({"overhead": self._overhead()})
        self._directory.finish(status, message)

    # Hooks

    def _attach(self) -> None:
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def _detach(self) -> None:
        if self._finder is not None:
            self._finder.stop()
        for handle in [*self._handles, *self._tap_handles]:
            handle.remove()
        self._handles, self._tap_handles = [], []

    def _before_forward(self, model: nn.Module, _: tuple[Any, ...]) -> None:
        self._recording = model.training and torch.is_grad_enabled()
        self._calls.clear()
        if self._ring is None and torch.is_grad_enabled():
            if self._finder is not None:
                self._finder.stop()  # the forward pass before this one raised an error
            self._first_maps = _FirstMaps()
            self._finder = ActivationFinder(model, self._first_maps.see)
            self._finder.start()

    def _after_forward(self, *_: object) -> None:
        if self._finder is not None:
            finder, self._finder = self._finder, None
            finder.stop()
            self._start(finder.taps())
        self._seen_forward |= self._recording
        self._recording = False

    def _start(self, taps: dict[str, tuple[Tap, ...]]) -> None:
        """Put hooks where the first forward pass showed the maps, and open the run."""
        for name, module in self._named_taps.items():
            taps[name] = (Tap(Call(module, 0, "output"), "peak"),)
        self._taps = taps
        slices = dict(self._layers)
        readers: dict[Call, dict[Reading, list[slice]]] = {}
        for name, places in taps.items():
            for tap in places:
                readers.setdefault(tap.where, {}).setdefault(tap.reading, []).append(slices[name])
        self._readers = readers
        self._gap_tap = self._choose_gap_tap(taps)

        self._check_taps()
        gap = self._first_maps.gap[self._gap_tap.where][self._gap_tap.reading]
        self._ring = Ring(
            RowLayout.of(self._layers.offsets[-1], len(gap)),
            self._device,
            unseen=[part for name, part in slices.items() if name not in taps],
        )

        for module, side in {(call.module, call.side) for call in [*readers, self._gap_tap.where]}:
            self._hook(module, side)
        self._open_run()
        if self._recording:
            for call, maps in self._first_maps.maps.items():
                self._add(call, maps, self._first_maps.gap[call][self._gap_tap.reading])
        del self._first_maps

    def _choose_gap_tap(self, taps: dict[str, tuple[Tap, ...]]) -> Tap:
        if self._gap_module is not None:
            return Tap(Call(self._gap_module, 0, "output"), "peak")
        last = next(name for name in reversed(self._convolutions) if name in taps)
        return taps[last][-1]

    def _check_taps(self) -> None:
        """Raise ConfigurationError for a module named by hand that shows no fitting map."""
        seen = self._first_maps.maps
        for name in filter(None, [self._gap_module, *self._named_taps.values()]):
            if Call(name, 0, "output") not in seen:
                raise ConfigurationError(
                    f"module '{name}' gave no map (N, C, ...) in the first forward pass"
                )
        for name, module in self._named_taps.items():
            channels = len(seen[Call(module, 0, "output")]["peak"])
            filters = self._convolutions[name].out_channels
            if channels != filters:
                raise ConfigurationError(
                    f"module '{module}' has {channels} channels, and {name} has {filters} filters"
                )

    def _open_run(self) -> None:
        layers = [
            Layer(
                name=name,
                index=index,
                filters=module.weight.shape[0],
                weight_shape=tuple(module.weight.shape),
                activation="; ".join(map(str, self._taps.get(name, ())))
                or "not in the forward pass",
            )
            for index, (name, module) in enumerate(self._convolutions.items())
        ]
        self._directory.start({**self._info, "gap_source": str(self._gap_tap)}, layers)
        encoder = TraceEncoder(
            self._directory.path,
            self._layers,
            self._initial_norms.cpu().numpy(),
            record_every=self._record_every,
            min_spell=self._min_spell,
            ratios=self._ratios,
            stop_when_diverged=self._stop_when_diverged,
        )
        self._writer = WriterThread(encoder)

    def _hook(self, name: str, side: str) -> None:
        module = self._modules[name]

        def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._on_map(Call(name, self._count(name, "output"), "output"), output)

        def on_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._on_map(Call(name, self._count(name, "input"), "input"), inputs[0])

        self._tap_handles.append(
            module.register_forward_hook(on_output)
            if side == "output"
            else module.register_forward_pre_hook(on_input)
        )

    def _count(self, module: str, side: str) -> int:
        key = (module, side)
        self._calls[key] = self._calls.get(key, -1) + 1
        return self._calls[key]

    @torch.no_grad()
    def _on_map(self, call: Call, values: Tensor) -> None:
        if self._capture is not None:
            layer, captured = self._capture
            tap = self._taps[self._layers.names[layer]][0]
            if tap.where == call:
                shown = values.clamp_min(0) if tap.reading == "positive" else values
                captured.append(shown.detach().clone())
        if not self._recording:
            return
        began = time.perf_counter()
        maps: dict[Reading, Tensor] = {}
        gap = None
        for reading in self._readers.get(call, ()):
            maps[reading] = read_map(values, reading)
        if call == self._gap_tap.where:
            maps[self._gap_tap.reading], gap = read_map_and_gap(values, self._gap_tap.reading)
        self._add(call, maps, gap)
        self.seconds += time.perf_counter() - began

    def _add(self, call: Call, maps: dict[Reading, Tensor], gap: Tensor | None) -> None:
        """Add a call's maps to the coming step's row: several batches make up one iteration."""
        assert self._ring is not None
        row, layout = self._ring.row, self._ring.layout
        for reading, parts in self._readers.get(call, {}).items():
            for part in parts:
                row[layout.activity][part] += maps[reading]
        if call == self._gap_tap.where and gap is not None:
            row[layout.gap] += gap

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._seen_forward:
            raise RecorderError(
                f"step {self._steps}: no training forward pass of {type(self.model).__name__} came "
                "before optimizer.step(); give FilterRecorder the module whose forward you call"
            )
        began = time.perf_counter()
        assert self._ring is not None
        row, layout = self._ring.row, self._ring.layout
        scale = getattr(optimizer, "grad_scale", None)
        self._write_gradient_norms(row[layout.gradient_norms], scale)
        scalars = row[layout.scalars]
        others = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) not in self._convolution_ids
        ]
        # Unknown norms (NaN) are of layers without a gradient; a NaN gradient must show.
        known = [
            row[layout.gradient_norms][part]
            for name, part in self._layers
            if self._convolutions[name].weight.grad is not None
        ]
        rest = torch.nn.utils.get_total_norm(others).to(self._device, torch.float32)
        grad_norm = torch.linalg.vector_norm(
            torch.cat([*known, (rest / scale if scale is not None else rest).reshape(1)])
        )
        told = {
            **self._told,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
        }
        for index, name in enumerate(SCALARS):
            if name in told:
                scalars[index] = told[name]
        for name, part in self._layers:
            if name in told.get("clip_factors", ()):
                row[layout.clip_factors][part] = told["clip_factors"][name]
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            # A fused optimizer skips the step on the device: only the writer learns of it.
            row[layout.skipped] = found_inf
        self._told = {}
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        began = time.perf_counter()
        assert self._ring is not None
        self._write_weight_norms(self._ring.row[self._ring.layout.weight_norms])
        self._seen_forward = False
        self._steps += 1
        if self._ring.advance() or time.monotonic() - self._handed_over > _HANDOVER_SECONDS:
            self._hand_over()
        self.seconds += time.perf_counter() - began

    # Measurements

    @torch.no_grad()
    def _write_weight_norms(self, out: Tensor) -> None:
        for module, (_, part) in zip(self._convolutions.values(), self._layers, strict=True):
            filter_norms(module.weight, out[part])

    def _write_gradient_norms(self, out: Tensor, scale: Tensor | None) -> None:
        for module, (_, part) in zip(self._convolutions.values(), self._layers, strict=True):
            if module.weight.grad is not None:
                filter_norms(module.weight.grad, out[part])
        if scale is not None:
            out /= scale

    def _hand_over(self) -> None:
        """Give the finished rows to the writer, and go on in the other half of the ring."""
        if self._ring is None or self._writer is None:
            return
        if block := self._ring.take():
            self._writer.submit(block)
        self._handed_over = time.monotonic()

    def _overhead(self) -> dict[str, float]:
        return {
            "recorder_seconds": self.seconds,
            "training_seconds": time.perf_counter() - self._started,
        }

    def _check_names(self, known: Iterable[str], names: Iterable[str]) -> None:
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                kind = "convolution" if known is self._convolutions else "module"
                raise ConfigurationError(f"the model has no {kind} '{name}'{hint}")


class _FirstMaps:
    """What the first forward pass showed, at every call: the taps are known only after it."""

    def __init__(self) -> None:
        self.maps: dict[Call, dict[Reading, Tensor]] = {}
        self.gap: dict[Call, dict[Reading, Tensor]] = {}

    @torch.no_grad()
    def see(self, call: Call, values: Tensor) -> None:
        readings: tuple[Reading, ...] = ("sum", "peak", "positive")
        both = {reading: read_map_and_gap(values, reading) for reading in readings}
        self.maps[call] = {reading: maps for reading, (maps, _) in both.items()}
        self.gap[call] = {reading: gap for reading, (_, gap) in both.items()}
