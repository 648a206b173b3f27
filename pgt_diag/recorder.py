"""FilterRecorder: hooks that measure every convolution's filters at every iteration.

The hooks reduce at once and keep no tensor. Results go to a ring of rows on the device, one row
per optimizer step; half of it at a time is copied beside the training stream and encoded by a
thread. Nothing in the step waits for the device.
"""

import atexit
import difflib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pgt_diag import trace
from pgt_diag.activations import Tap, any_known, convolutions
from pgt_diag.arguments import (
    Place,
    Places,
    check_attached,
    check_entries,
    check_filters,
    check_maps,
    check_scalars,
    check_snapshot,
    count,
    epoch_row,
    fraction,
    module_calls,
)
from pgt_diag.directory import RunDirectory
from pgt_diag.encoder import TraceEncoder, layer_slices
from pgt_diag.errors import ConfigurationError, RecorderError
from pgt_diag.filters import COLLAPSED_RATIO, ZEROED_RATIO
from pgt_diag.observer import MapObserver, Named
from pgt_diag.reading import NOT_SEEN, Ending, Layer
from pgt_diag.reductions import filter_norms, rows_of, write_total_norm
from pgt_diag.ring import Ring, Row, RowLayout
from pgt_diag.sgd import MeasuringSGD
from pgt_diag.used_weights import GradientWatch, parameter_of, used_weight, weight_shape
from pgt_diag.writer import WriterThread

_HANDOVER_SECONDS = 0.25
"""So long a row waits at most for the writer; with `writer.FLUSH_SECONDS`, what a kill can cost."""
_STATE = ("steps", "seconds", "training_seconds", "directory", "encoder")
"""What is in a recorder's state, but for what it is of."""


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
    convolution's post-activation map (in a network that concatenates, name the pooled module), or
    of the output of the module named `gap_module`.

    Of a convolution whose weight is computed from other parameters (weight norm, spectral norm,
    pruning) the weight is the one that it uses in eval mode, and the gradient the one at that
    weight; it is unknown where autograd does not show it, and under data parallelism.

    A layer whose map cannot be followed (frozen, or behind an operation that is no module), or
    that a step's forward passes did not call, has unknown activity: it is never called silent.
    `taps` names such a map. A GradScaler's skipped step is no iteration, and its batch is
    forgotten, unless the loop zeroes gradients with `set_to_none=False`.

    A whole step may be captured as a CUDA graph, with `capture_error_mode="thread_local"` since a
    thread writes meanwhile; tell `replayed()` of every replay.

    On a GPU, until the recorder is closed, `nn.ReLU` modules have a `forward` of its own, which
    computes the same and marks active channels on the way; copies of the model have theirs.

    Under data parallelism every process makes a recorder, and only the first one (rank 0) writes:
    give it a checkpoint's state to resume from in all of them, and log values of the whole batch.
    Activity and GAP features are those of the batch that all processes share; the other
    processes' `iterations`, `latest` and `diverged_at` say nothing.

    Arguments:
        model: the module whose `forward` the loop calls; with DDP, the module inside.
        directory: the run directory to create.
        optimizer: the optimizer that updates the model's weights.
        taps: name by hand which module's output is the post-activation map of a convolution,
            `{"conv1": "relu"}`; of a module that a forward pass calls several times, which call,
            from 1: `{"conv2": ("relu", 2)}`, or a list of them. The others are found from the
            first forward pass.
        record_every: store norms every so many iterations with each window's extremes; by default
            all of the first 4,096, then ever fewer (18,000 rows at half a million iterations).
            Events are exact all the same.
        min_spell: log a state from this many iterations on; shorter spells are only counted.
        collapsed_ratio, zeroed_ratio: the norm thresholds of these states, relative to the start.
        stop_when_diverged: take a NaN or infinite loss, told by `log`, for the end: that iteration
            and later ones are not recorded, and `diverged_at` names it.
        info: more entries for run.json, plain JSON values.
        resume: a `state_dict` of an earlier recorder of the run in `directory`, saved with the
            model's and the optimizer's: recording goes on from there, each iteration once. What
            was recorded after it is moved to `set-aside/`.
        force: replace a run that the directory already holds.

    Raises:
        ConfigurationError: an argument cannot be used: the model has no convolution, a name is
            unknown, a number is out of range; `resume` is of another model or other settings.
        RunDirectoryError: the directory already holds a run, is being written, or lacks what
            `resume` goes on from.
        RecorderError: at a step that no training forward pass of `model` preceded, or that takes a
            closure.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | Path,
        *,
        optimizer: torch.optim.Optimizer,
        taps: Mapping[str, Places] | None = None,
        gap_module: Place | None = None,
        record_every: int | None = None,
        min_spell: int = 1,
        collapsed_ratio: float = COLLAPSED_RATIO,
        zeroed_ratio: float = ZEROED_RATIO,
        stop_when_diverged: bool = False,
        info: dict[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        check_attached(model, directory, optimizer, resume)
        check_entries("info", info or {})
        self._settings: dict[str, Any] = {
            "record_every": None if record_every is None else count("record_every", record_every),
            "min_spell": count("min_spell", min_spell),
            "collapsed_ratio": fraction("collapsed_ratio", collapsed_ratio),
            "zeroed_ratio": fraction("zeroed_ratio", zeroed_ratio),
        }
        self.model = model
        self._convolutions = convolutions(model)
        self._rank, self._world = _rank_and_world()
        if not self._convolutions:
            raise ConfigurationError(f"{type(model).__name__} has no convolution to record")
        named_taps, named_gap = self._named(taps, gap_module)
        weights = self._weights()
        self._device = weights[0].device
        self._layers = layer_slices(list(self._convolutions), [len(weight) for weight in weights])
        self._filters = dict(zip(self._convolutions, map(len, weights), strict=True))
        self._stop_when_diverged = stop_when_diverged
        self._initial_norms = torch.empty(
            self._layers.offsets[-1], dtype=torch.float32, device=self._device
        )
        parts = [self._initial_norms[part] for _, part in self._layers]
        with torch.no_grad():
            filter_norms(weights, parts)
        self._identity: dict[str, Any] = {
            "layers": list(
                map(list, zip(self._layers.names, self._layers.offsets[1:], strict=True))
            ),
            "settings": self._settings,
        }
        self._path = Path(directory).resolve()
        self._directory: RunDirectory | None = None
        if resume is not None:
            self._check_identity(resume)
        self._index = {name: index for index, name in enumerate(self._layers.names)}

        self._ring: Ring | None = None
        self._writer: WriterThread | None = None
        self._handed_over = time.monotonic()
        self._steps = 0
        self._told: dict[str, Any] = {}
        self._snapshots: set[tuple[int, str]] = set()
        self._measuring: Tensor | None = None
        self._seconds = self._earlier_seconds = 0.0
        self._forget_seen()
        self._watches: dict[str, GradientWatch] = {}
        self._observer = MapObserver(model, self, named_taps=named_taps, gap_module=named_gap)
        self._step_handles: list[RemovableHandle] = []
        try:
            self._attach(optimizer)
            # Last: whatever fails before has made no directory, and keeps nobody out of one.
            self._open(Path(directory), info or {}, resume, force=force)
        except BaseException:
            self._give_back()
            raise
        self._started = time.perf_counter()
        atexit.register(self._close_at_exit)

    # What a training loop calls

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        if isinstance(error, SystemExit) and error.code in (None, 0):
            self.close()
            return
        status: Ending = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.close(status, message=f"{kind.__name__}: {error}")

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._path

    @property
    def seconds(self) -> float:
        """Time that recording has taken on the training thread, seconds."""
        return self._seconds + self._observer.seconds

    @property
    def steps(self) -> int:
        """How many optimizer steps were seen, also those that a fused optimizer then skipped."""
        return self._steps

    @property
    def convolution_weights(self) -> list[tuple[str, Tensor]]:
        """The recorded convolutions' names and weights, those that are parameters."""
        weights = [(name, parameter_of(module)) for name, module in self._convolutions.items()]
        return [(name, weight) for name, weight in weights if weight is not None]

    @property
    def iterations(self) -> int:
        """How many iterations the writer has seen; all of them after `flush`."""
        return self._writer.encoder.iterations if self._writer else 0

    @property
    def dead_filters(self) -> int:
        """How many filters are dead as far as the writer has come: a second or so ago.

        By the definition of a report (`pgt_diag.filters.deaths`), were this the end of the run.
        """
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
        gradient_norms: dict[str, Tensor] | None = None,
    ) -> None:
        """Add what only the loop knows to the coming step's row; call it before `step()`.

        Tensors are taken as they are on the device, without waiting for it. `accuracy` is a
        percentage, `clip_factors` maps convolutions to (filters,) factors in [0, 1].
        `gradient_norms` maps them to (filters,) norms of the gradients that the optimizer will get,
        where the loop has computed these: they are not computed again. 0 must mean a gradient of
        zeros.

        Raises ConfigurationError for an unknown convolution, and for anything of another shape.
        """
        scalars = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm_before_clip": grad_norm_before_clip,
            "clip_coefficient": clip_coefficient,
        }
        told: dict[str, Any] = {name: each for name, each in scalars.items() if each is not None}
        check_scalars(told)
        by_layer = {"clip_factors": clip_factors, "gradient_norms": gradient_norms}
        for name, values in by_layer.items():
            if values is not None:
                _check_names("convolution", self._index, values)
                check_filters(name, values, self._filters)
                told[name] = values
        self._told |= told

    def replayed(self) -> None:
        """Count a replay of the CUDA graph that a whole step was captured in, hooks included.

        Call it after every `graph.replay()`: what was measured lies in the row of the coming step,
        and the replay ran no hook. The capture itself counts as no step. At least one step has to
        be made before it, outside any graph.

        Raises RecorderError when no step was made before.
        """
        began = time.perf_counter()
        if self._ring is None or not self._steps:
            raise RecorderError("replayed: make a step before the capture, outside any CUDA graph")
        self._finish_row(self._ring)
        self._seconds += time.perf_counter() - began

    def update_info(self, values: dict[str, Any]) -> None:
        """Merge entries, plain JSON values, into run.json.

        Raises ConfigurationError for an entry of the recorder's own, and for one that could not be
        read again; RecorderError when the recorder is closed.
        """
        self._check_open("update_info")
        check_entries("values", values)
        if self._directory is not None:
            self._directory.update(values)

    def log_epoch(self, values: dict[str, Any]) -> None:
        """Append one row to metrics.csv; the first call decides the columns.

        Raises ConfigurationError for other columns, and for text where reports calculate;
        RecorderError when the recorder is closed.
        """
        self._check_open("log_epoch")
        if self._directory is not None:
            self._directory.append_metrics(epoch_row(values, self._directory.metrics_columns))

    def snapshot(
        self, layer: int, images: Tensor, originals: Tensor, labels: Iterable[str]
    ) -> None:
        """Store the post-activation maps of convolution `layer` for fixed images.

        images: (n, 3, H, W) float, as the model takes them, in eval mode and without autocast;
        originals: (n, 3, H, W) uint8, to be shown beside the maps. At one iteration there is one
        snapshot of a layer, and there may be some of several layers.

        Raises ConfigurationError for what cannot be stored, or not be read again; RecorderError
        when the recorder is closed.
        """
        self._check_open("snapshot")
        labels = list(map(str, labels))
        check_snapshot(layer, len(self._layers.names), images, originals, labels)
        if self._directory is None:
            return
        began = time.perf_counter()
        name = self._layers.names[layer]
        self.flush()
        if (self.iterations, name) in self._snapshots:
            raise ConfigurationError(
                f"iteration {self.iterations} has a snapshot of '{name}' already; give all its "
                "images at once"
            )
        maps = self._observer.capture(name, images.to(self._device))
        check_maps(name, maps, originals)
        self._snapshots.add((self.iterations, name))
        self._directory.write_feature_maps(self.iterations, name, maps, originals, labels)
        self._seconds += time.perf_counter() - began

    def _check_open(self, call: str) -> None:
        if not self._step_handles:
            raise RecorderError(f"{call}: the recorder is closed")

    def flush(self) -> None:
        """Wait until every iteration so far is on disk, to be read from the run directory."""
        self._hand_over()
        if self._writer is not None and self._step_handles:
            self._writer.flush()

    def state_dict(self) -> dict[str, Any]:
        """Put every iteration so far on disk; return what a later recorder's `resume` goes on from.

        Call it between two iterations, and save it with `torch.save` beside the model's and the
        optimizer's state: it holds tensors, numbers and text only, so that `torch.load(...,
        weights_only=True)` reads it.
        """
        self.flush()
        encoder = self._writer.encoder.state_dict() if self._writer is not None else None
        state = {
            **self._identity,
            "steps": self._steps,
            "seconds": self.seconds,
            "training_seconds": self._training_seconds,
            "directory": self._directory.state_dict() if self._directory is not None else None,
            "encoder": encoder,
        }
        tensors: dict[str, Any] = _with_tensors(state)
        return tensors

    def close(self, status: Ending = "finished", message: str | None = None) -> None:
        """Take the hooks off, write everything, seal the run; further calls do nothing."""
        if not self._step_handles:
            return
        atexit.unregister(self._close_at_exit)
        self._detach()
        sealed = {}
        try:
            try:
                self._hand_over()
            finally:
                if self._writer is not None:
                    complete = status in ("finished", "diverged")
                    sealed = self._writer.close(complete=complete)
        except BaseException as error:
            if self._directory is not None:
                self._directory.finish("failed", f"recording stopped: {error}")
            raise
        if self._directory is not None:
            self._directory.update({"overhead": self._overhead(), "iterations": self.iterations})
            self._directory.finish(status, message, sealed)

    def _detach(self) -> None:
        """Take all hooks off."""
        self._observer.close()
        for watch in self._watches.values():
            watch.remove()
        for handle in self._step_handles:
            handle.remove()
        self._step_handles = []

    def _close_at_exit(self) -> None:
        self.close("interrupted", "the process ended before the recorder was closed")

    def _named(
        self, taps: Mapping[str, Places] | None, gap_module: Place | None
    ) -> tuple[dict[str, list[Named]], Named | None]:
        """Return the modules named by hand; ConfigurationError for a name that is not there."""
        if taps is not None and not isinstance(taps, Mapping):
            raise ConfigurationError("taps must be a dict from convolutions to modules")
        _check_names("convolution", self._convolutions, taps or ())
        named = {name: module_calls(f"taps['{name}']", each) for name, each in (taps or {}).items()}
        gap = None if gap_module is None else module_calls("gap_module", gap_module)
        if gap and len(gap) > 1:
            raise ConfigurationError("gap_module names several modules; name one")
        modules = [module for each in [*named.values(), gap or []] for module, _ in each]
        _check_names("module", [name for name, _ in self.model.named_modules() if name], modules)
        return named, gap[0] if gap else None

    def _give_back(self) -> None:
        """Take the hooks off and let others write the directory, where it could not be opened."""
        self._detach()
        if self._directory is not None:
            self._directory.unlock()

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        self._watch_computed()
        self._step_handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._step_handles.append(optimizer.register_step_post_hook(self._after_step))

    def _open(
        self, path: Path, info: dict[str, Any], resume: Mapping[str, Any] | None, *, force: bool
    ) -> None:
        """Create the run directory, or go on in it."""
        if self._rank:
            pass  # the first process writes
        elif resume is None:
            begin = {"status": "running", "message": None, "model": type(self.model).__name__}
            info = begin | self._settings | info
            self._directory = RunDirectory.create(path, force=force, info=info)
        else:
            self._directory = RunDirectory.reopen(path)
            self._restore(self._directory, resume, info)
        if resume is not None:
            self._go_on(resume)

    # What the observer's and the optimizer's hooks call

    def begin(self, taps: dict[str, tuple[Tap, ...]], gap_tap: Tap, gap_features: int) -> None:
        """Open the run, now that the first forward pass has shown the maps (MapSink)."""
        before = self._writer.encoder.gap_features if self._writer is not None else None
        if before not in (None, gap_features):
            raise ConfigurationError(
                f"{gap_tap} has {gap_features} GAP features, and in the run that goes on {before}"
            )
        self._ring = Ring(
            RowLayout.of(self._layers.offsets[-1], gap_features),
            self._device,
            [part for _, part in self._layers],
            unseen=[index for index, name in enumerate(self._layers.names) if name not in taps],
        )
        self._open_run(taps, gap_tap)

    def activity(self, layer: str) -> Tensor:
        """Return the coming step's row: several batches make up one iteration (MapSink)."""
        assert self._ring is not None
        self._unseen.discard(layer)
        return self._ring.row.activity_of[self._index[layer]]

    def gap(self) -> Tensor:
        """Return the coming step's row (MapSink)."""
        assert self._ring is not None
        self._gap_unseen = False
        return self._ring.row.gap

    def discard(self) -> None:
        """Blank the coming step's row (MapSink)."""
        assert self._ring is not None
        self._ring.clear()
        self._forget_seen()

    def _forget_seen(self) -> None:
        self._unseen = set(self._index)
        self._gap_unseen = True

    def _open_run(self, taps: dict[str, tuple[Tap, ...]], gap_tap: Tap) -> None:
        if self._directory is None:
            return
        layers = [
            asdict(
                Layer(
                    name=name,
                    index=index,
                    filters=self._filters[name],
                    weight_shape=weight_shape(module),
                    activation="; ".join(map(str, taps.get(name, ()))) or NOT_SEEN,
                    addition=any_known([tap.addition for tap in taps.get(name, ())] or [None]),
                )
            )
            for index, (name, module) in enumerate(self._convolutions.items())
        ]
        self._directory.update({"gap_source": str(gap_tap), "layers": layers})
        if self._writer is None:
            self._start_writer(self._directory, None)

    def _start_writer(self, directory: RunDirectory, state: Mapping[str, Any] | None) -> None:
        encoder = TraceEncoder(
            directory.path,
            self._layers,
            self._initial_norms.cpu().numpy(),
            record_every=self._settings["record_every"],
            min_spell=self._settings["min_spell"],
            ratios=(self._settings["collapsed_ratio"], self._settings["zeroed_ratio"]),
            stop_when_diverged=self._stop_when_diverged,
            planned_iterations=directory.planned_iterations,
            state=state,
        )
        self._writer = WriterThread(encoder)

    # Resuming

    def _check_identity(self, resume: Mapping[str, Any]) -> None:
        """Raise ConfigurationError unless `resume` is of this model and these settings."""
        for kind, mine in self._identity.items():
            theirs = resume.get(kind)
            if theirs != mine:
                detail = f"{theirs}, not {mine}" if kind == "settings" else "other convolutions"
                raise ConfigurationError(f"the recorder's state is of other {kind}: {detail}")
        missing = [key for key in _STATE if key not in resume]
        if missing:
            raise ConfigurationError(f"the recorder's state has no '{missing[0]}'")

    def _restore(
        self, directory: RunDirectory, resume: Mapping[str, Any], info: dict[str, Any]
    ) -> None:
        encoder = resume["encoder"] or {"iterations": 0, "event_count": 0, "last_stored": -1}
        ends = {
            trace.NORMS_FOLDER: int(encoder["last_stored"]) + 1,
            trace.ITERATIONS_FOLDER: int(encoder["iterations"]),
            trace.EVENTS_FOLDER: int(encoder["event_count"]),
            trace.BRIEF_SPELLS_FOLDER: 0,
        }
        directory.restore(resume["directory"], ends, ends[trace.ITERATIONS_FOLDER])
        directory.update(info)

    def _go_on(self, resume: Mapping[str, Any]) -> None:
        self._steps = int(resume["steps"])
        self._seconds = float(resume["seconds"])
        self._earlier_seconds = float(resume["training_seconds"])
        if resume["encoder"] is not None and self._directory is not None:
            self._start_writer(self._directory, _with_arrays(resume["encoder"]))

    @torch.no_grad()
    def _before_step(
        self,
        optimizer: torch.optim.Optimizer,
        arguments: tuple[Any, ...],
        named_arguments: dict[str, Any],
    ) -> None:
        # torch gives the optimizer itself as the first argument of `step`.
        self._check_step([*arguments[1:], *named_arguments.values()])
        began = time.perf_counter()
        assert self._ring is not None
        row = self._ring.row
        self._share_activity(row)
        if self._rank:
            return
        self._watch_computed()
        self._measuring = self._have_it_measured(row, optimizer)
        if self._measuring is None:
            self._write_gradient_norms(row, optimizer)
        told = {**self._told, "lr": optimizer.param_groups[0]["lr"]}
        for name, place in row.scalars.items():
            value = told.get(name)
            if isinstance(value, Tensor):
                place.fill_(value.reshape(()))
            elif value is not None:
                place.fill_(value)
        self._put(row.clip_factors_of, told.get("clip_factors", {}))
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            # A fused optimizer skips the step on the device: only the writer learns of it.
            row.skipped.copy_(found_inf)
        self._told = {}
        self._seconds += time.perf_counter() - began

    def _share_activity(self, row: Row) -> None:
        """Complete what the hooks have added up: over all processes, and unknown where unseen."""
        for name in self._unseen:
            row.activity_of[self._index[name]].fill_(torch.nan)
        if self._gap_unseen:
            row.gap.fill_(torch.nan)
        self._forget_seen()
        if self._world > 1:
            torch.distributed.all_reduce(row.shared)

    def _check_step(self, arguments: list[Any]) -> None:
        """Raise RecorderError for a step whose measurements would be wrong."""
        step, model = f"step {self._steps}", type(self.model).__name__
        if any(argument is not None for argument in arguments):
            raise RecorderError(f"{step}: optimizer.step(closure) cannot be recorded")
        if not self._observer.take_training_pass():
            remedy = (
                "give FilterRecorder the module whose forward you call"
                if self.model.training
                else "it is in eval mode, call model.train()"
            )
            raise RecorderError(
                f"{step}: no training forward pass of {model} came before optimizer.step(); "
                f"{remedy}"
            )
        if self._stop_when_diverged and "loss" not in self._told:
            raise RecorderError(f"{step}: stop_when_diverged needs log(loss=...) at every step")

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        began = time.perf_counter()
        assert self._ring is not None
        row = self._ring.row
        if self._measuring is not None:
            write_total_norm(row.gradient_norms, self._measuring, row.scalars["grad_norm"])
        elif not self._rank:
            filter_norms(self._weights(), row.weight_norms_of)
        if not is_capturing(self._device):
            self._finish_row(self._ring)
        self._seconds += time.perf_counter() - began

    def _finish_row(self, ring: Ring) -> None:
        self._steps += 1
        if ring.advance() or time.monotonic() - self._handed_over > _HANDOVER_SECONDS:
            self._hand_over()

    # Measurements

    def _weights(self) -> list[Tensor]:
        return [used_weight(module) for module in self._convolutions.values()]

    def _watch_computed(self) -> None:
        """Follow the gradients of weights that are no parameters; pruning may begin in mid-run."""
        for name, module in self._convolutions.items():
            if parameter_of(module) is None and name not in self._watches:
                self._watches[name] = GradientWatch(module)

    def _have_it_measured(self, row: Row, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Have the optimizer's step write the norms, if it can, with those of other parameters.

        Returns where the norms of the other parameters' gradients will be.
        """
        if not isinstance(optimizer, MeasuringSGD) or self._world > 1:
            return None  # the other processes' steps would round otherwise
        if self._watches:
            return None
        parameters = optimizer.measured()
        places = dict(
            zip(
                self._weights(),
                zip(row.gradient_norms_of, row.weight_norms_of, strict=True),
                strict=True,
            )
        )
        shared = len(places) < len(self._convolutions)  # a weight has one place to write to
        if shared or not {id(weight) for weight in places} <= {id(each) for each in parameters}:
            return None
        others = [parameter for parameter in parameters if parameter not in places]
        sizes = [len(rows_of(parameter)) for parameter in others]
        rest, unused = row.values.new_empty(2, sum(sizes)).unbind()
        parts = zip(torch.split(rest, sizes), torch.split(unused, sizes), strict=True)
        optimizer.measure(places | dict(zip(others, parts, strict=True)))
        return rest

    def _write_gradient_norms(self, row: Row, optimizer: torch.optim.Optimizer) -> None:
        """Write the filters' gradient norms, and that of the gradients of all parameters."""
        told = self._told.get("gradient_norms", {})
        self._put(row.gradient_norms_of, told)
        weights = self.convolution_weights
        places = [
            (name, weight, row.gradient_norms_of[self._index[name]]) for name, weight in weights
        ]
        # A layer without a gradient has unknown norms (NaN); a NaN in a gradient must show.
        with_gradient = [(n, w.grad, out) for n, w, out in places if w.grad is not None]
        known = [(gradient, out) for name, gradient, out in with_gradient if name not in told]
        recorded = {id(weight) for _, weight in weights}
        others = [
            rows_of(parameter.grad.to(self._device))
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) not in recorded
        ]
        sizes = [len(rows) for rows in others]
        rest = row.values.new_empty(sum(sizes))
        filter_norms(
            [*(gradient for gradient, _ in known), *others],
            [*(out for _, out in known), *torch.split(rest, sizes)],
        )
        self._write_computed(row, told)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            row.gradient_norms.div_(scale)
            rest.div_(scale)
        norms = row.gradient_norms
        if len(with_gradient) < len(self._convolutions):
            norms = torch.cat([norms.new_empty(0), *(out for _, _, out in with_gradient)])
        write_total_norm(norms, rest, row.scalars["grad_norm"])

    def _write_computed(self, row: Row, told: Mapping[str, Tensor]) -> None:
        """Write the gradient norms at weights that are no parameters, where they are known."""
        for name, watch in self._watches.items():
            norms = watch.take_norms()
            if (
                name not in told
                and self._world == 1
                and parameter_of(self._convolutions[name]) is None
            ):
                row.gradient_norms_of[self._index[name]].copy_(norms)

    def _put(self, places: Sequence[Tensor], values: Mapping[str, Tensor]) -> None:
        if values:
            chosen = [places[self._index[name]] for name in values]
            torch._foreach_copy_(chosen, list(values.values()))

    def _hand_over(self) -> None:
        """Give the finished rows to the writer, and go on in the other half of the ring."""
        if self._ring is None:
            return
        block = self._ring.take()
        if block is not None and self._writer is not None:
            began = time.perf_counter()
            self._writer.submit(block)
            if self._device.type == "cuda":
                # It waited for the device, which is behind: that is training's time.
                self._seconds -= time.perf_counter() - began
        self._handed_over = time.monotonic()

    def _overhead(self) -> dict[str, float]:
        return {
            "recorder_seconds": self.seconds,
            "training_seconds": self._training_seconds,
        }

    @property
    def _training_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started


def _rank_and_world() -> tuple[int, int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on the device is being captured as a CUDA graph, and not yet done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_names(kind: str, known: Iterable[str], names: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigurationError(f"the model has no {kind} '{name}'{hint}")


def _with_tensors(value: Any) -> Any:
    """Return nested values with NumPy arrays as tensors: a safe `torch.load` knows only these."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _with_tensors(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_tensors(entry) for entry in value]
    return value


def _with_arrays(value: Any) -> Any:
    """Return what `_with_tensors` was given."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _with_arrays(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_arrays(entry) for entry in value]
    return value
