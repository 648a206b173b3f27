"""Reads every convolution's post-activation map in each training forward pass.

Which module's call shows that map is found in the first forward pass; from then on there are
hooks at those calls only. They reduce a map at once and keep no tensor.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgt_diag.activations import ActivationFinder, Call, Hook, Tap, convolutions
from pgt_diag.errors import ConfigurationError, RecorderError
from pgt_diag.reductions import (
    Reading,
    add_activity,
    add_activity_and_gap,
    working_kernels,
)
from pgt_diag.relu import MarkingReLU, marking_relu

Named = tuple[str, int | None]
"""A module named by hand, and which of its calls, from 1, if that was told."""


class MapSink(Protocol):
    """Who gets what the observer reads. All tensors are float32, on the model's device."""

    def begin(self, taps: dict[str, tuple[Tap, ...]], gap_tap: Tap, gap_features: int) -> None:
        """Take where each convolution is read; once, before anything is added."""

    def activity(self, layer: str) -> Tensor:
        """Return where to add, in place, what is above 0 where a channel is not silent; (filters,).

        It is asked for at every call of the layer.
        """

    def gap(self) -> Tensor:
        """Return where to add, in place, the squares of the GAP features; (features,)."""

    def discard(self) -> None:
        """Forget what was added since the last step: its gradients were thrown away."""


class MapObserver:
    """Hooks of one model; `sink` gets the reductions.

    named_taps: where the user names the maps, by convolution: modules, and which of their calls,
    from 1, unless there is only one; gap_module: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        sink: MapSink,
        *,
        named_taps: Mapping[str, Sequence[Named]],
        gap_module: Named | None,
    ) -> None:
        self.ready = False
        """Whether the first forward pass has been seen."""
        self.seconds = 0.0
        """Time taken so far, seconds."""
        self._model = model
        self._sink = sink
        self._named_taps = named_taps
        self._gap_module = gap_module
        self._training_pass = False
        self._seen_training_pass = False
        self._seen_backward = False
        self._finder: ActivationFinder | None = None
        self._calls: dict[tuple[str, str], int] = {}
        self._marked: set[Call] = set()
        self._relus: list[MarkingReLU] = []
        self._capture: tuple[Tap, list[Tensor]] | None = None
        self._taps: dict[str, tuple[Tap, ...]] = {}
        self._readers: dict[Call, dict[Reading, list[str]]] = {}
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before_forward)),
            model.register_forward_hook(Hook(self._after_forward), with_kwargs=True),
        ]
        trained = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
        self._witness = trained[0] if trained else None
        if self._witness is not None:
            watch: Any = self._witness.register_post_accumulate_grad_hook
            self._handles.append(watch(Hook(self._after_backward)))

    def close(self) -> None:
        """Take all hooks off."""
        if self._finder is not None:
            self._finder.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for relu in self._relus:
            relu.remove()
        self._relus.clear()

    def take_training_pass(self) -> bool:
        """Return whether a training forward pass was seen since the last call."""
        seen, self._seen_training_pass = self._seen_training_pass, False
        self._seen_backward = False
        return seen

    def capture(self, layer: str, images: Tensor) -> Tensor:
        """Return the map of a convolution for these images, in eval mode and without gradient."""
        captured: list[Tensor] = []
        with self._evaluating():
            if not self.ready:
                # The first forward pass of all finds the taps, from its autograd graph.
                with torch.enable_grad():
                    self._model(images)
            if layer not in self._taps:
                raise ConfigurationError(
                    f"the map of '{layer}' cannot be seen in the forward pass; name it with taps"
                )
            self._capture = (self._taps[layer][0], captured)
            try:
                with torch.no_grad():
                    self._model(images)
            finally:
                self._capture = None
        return captured[0]

    def _before_forward(self, model: nn.Module, _: tuple[Any, ...]) -> None:
        failed = self._training_pass
        self._training_pass = model.training and torch.is_grad_enabled()
        self._calls.clear()
        self._marked.clear()
        if self._training_pass and self.ready and (failed or self._gradients_discarded()):
            self._sink.discard()
        if not self.ready and torch.is_grad_enabled():
            if self._finder is not None:
                self._finder.stop()  # the forward pass before this one raised an error
            self._first_maps = _FirstMaps()
            self._finder = ActivationFinder(model, self._first_maps.see)
            self._finder.start()

    def _after_backward(self, _: Tensor) -> None:
        self._seen_backward = True

    def _gradients_discarded(self) -> bool:
        """Whether a GradScaler skipped the step of the gradients that the last passes made.

        They were there, no step came, and they are gone: only `zero_grad` does that.
        """
        return (
            self._seen_training_pass
            and self._seen_backward
            and self._witness is not None
            and self._witness.grad is None
        )

    def _after_forward(
        self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        if self._finder is not None:
            finder, self._finder = self._finder, None
            finder.stop()
            compiled = finder.is_compiled(output)
            self._start(self._find(arguments, named) if compiled else finder.taps(output))
            if not compiled:
                self._mark_in_relus()
        self._seen_training_pass |= self._training_pass
        self._training_pass = False

    def _find(
        self, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> dict[str, tuple[Tap, ...]]:
        """Return the taps of a compiled model, from a pass that is not, in eval mode."""
        finder = ActivationFinder(self._model, lambda *_: None)
        with self._evaluating():
            finder.start()
            try:
                with torch.enable_grad():
                    output = self._model.forward(*arguments, **named)
            finally:
                finder.stop()
        return finder.taps(output)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _start(self, taps: dict[str, tuple[Tap, ...]]) -> None:
        """Put hooks where the first forward pass showed the maps, and add what it showed."""
        first, self._first_maps = self._first_maps, _FirstMaps()
        for name, modules in self._named_taps.items():
            found = {tap.where: tap for tap in taps.get(name, ())}
            calls = [_named_call(named, first, f"taps={{'{name}': CALL}}") for named in modules]
            self._check_channels(name, calls, first)
            taps[name] = tuple(found.get(call, Tap(call, "peak")) for call in calls)
        self._gap_tap = self._choose_gap_tap(taps, first)
        self._taps = taps
        for name, places in taps.items():
            for tap in places:
                self._readers.setdefault(tap.where, {}).setdefault(tap.reading, []).append(name)
        gap = first.gap[self._gap_tap.where][self._gap_tap.reading]
        for module, side in {(c.module, c.side) for c in [*self._readers, self._gap_tap.where]}:
            self._hook(module, side)
        self._sink.begin(taps, self._gap_tap, len(gap))
        self.ready = True
        if self._training_pass:
            for call in self._readers:
                for reading, rows in self._places(call):
                    for row in rows:
                        row.add_(first.maps[call][reading])
            self._sink.gap().add_(gap)

    def _choose_gap_tap(self, taps: dict[str, tuple[Tap, ...]], first: "_FirstMaps") -> Tap:
        """Return the tap of the map that the forward pass showed last: it goes to the classifier.

        Not the last module's: squeeze-and-excitation's gate comes before the map that it weighs.
        """
        if self._gap_module is not None:
            return Tap(_named_call(self._gap_module, first, "gap_module=CALL"), "peak")
        order = {call: place for place, call in enumerate(first.maps)}
        found = [
            places[-1]
            for name in convolutions(self._model)
            for places in [taps.get(name)]
            if places
        ]
        if not found:
            raise ConfigurationError(_why_nothing_was_seen(first))
        return max(found, key=lambda tap: order[tap.where])

    def _check_channels(self, name: str, calls: list[Call], first: "_FirstMaps") -> None:
        """Raise ConfigurationError for a call named by hand whose map is not of the filters."""
        filters = convolutions(self._model)[name].out_channels
        for call in calls:
            channels = len(first.maps[call]["peak"])
            if channels != filters:
                raise ConfigurationError(
                    f"module '{call.module}' has {channels} channels, and {name} has {filters} "
                    "filters"
                )

    def _hook(self, name: str, side: str) -> None:
        module = self._model.get_submodule(name)

        def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._on_map(Call(name, self._count(name, "output"), "output"), output)

        def on_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._on_map(Call(name, self._count(name, "input"), "input"), inputs[0])

        self._handles.append(
            module.register_forward_hook(Hook(on_output))
            if side == "output"
            else module.register_forward_pre_hook(Hook(on_input))
        )

    def _mark_in_relus(self) -> None:
        """Have ReLUs say which channels are not silent, where a GPU can: to read a map takes long.

        Not in a compiled model: what has been compiled knows nothing of it.
        """
        parameter = self._witness
        if parameter is None or working_kernels(parameter.device) is None:
            return
        for name in {call.module for call in self._readers if call.side == "output"}:
            module = self._model.get_submodule(name)
            # As it comes, without a forward that somebody else has put there.
            if type(module) is nn.ReLU and "forward" not in vars(module):
                self._relus.append(MarkingReLU(module, partial(self._relu, name, module)))

    def _relu(self, name: str, module: nn.ReLU, values: Tensor) -> Tensor:
        call = Call(name, self._calls.get((name, "output"), -1) + 1, "output")
        layers = self._readers.get(call, {}).get("sum", [])
        kernels = working_kernels(values.device)
        if not (self._training_pass and layers and kernels and kernels.takes_relu(values)):
            return F.relu(values, inplace=module.inplace)
        self._marked.add(call)
        places = [self._sink.activity(layer) for layer in layers]
        return marking_relu(values, places, kernels, inplace=module.inplace)

    def _count(self, module: str, side: str) -> int:
        key = (module, side)
        self._calls[key] = self._calls.get(key, -1) + 1
        return self._calls[key]

    @torch.no_grad()
    def _on_map(self, call: Call, values: Tensor) -> None:
        if self._capture is not None and self._capture[0].where == call:
            tap, captured = self._capture
            shown = values.clamp_min(0) if tap.reading == "positive" else values
            captured.append(shown.detach().clone())
        if not self._training_pass:
            return
        _check_batch(call, values)
        began = time.perf_counter()
        gap_reading = self._gap_tap.reading if call == self._gap_tap.where else None
        places = dict(self._places(call))
        if call in self._marked:
            del places["sum"]
        if gap_reading is not None:
            outs = places.pop(gap_reading, [])
            add_activity_and_gap(values, gap_reading, outs, self._sink.gap())
        for reading, outs in places.items():
            add_activity(values, reading, outs)
        self.seconds += time.perf_counter() - began

    def _places(self, call: Call) -> Iterator[tuple[Reading, list[Tensor]]]:
        for reading, layers in self._readers.get(call, {}).items():
            yield reading, [self._sink.activity(layer) for layer in layers]


def _check_batch(call: Call, values: Tensor) -> None:
    """Raise RecorderError for a map of no images: in it every filter would look dead."""
    if not len(values):
        raise RecorderError(
            f"the batch is empty: 0 images reached module '{call.module}'; leave such batches out, "
            "with drop_last=True for example"
        )


def _named_call(named: Named, first: "_FirstMaps", example: str) -> Call:
    """Return the call that is named by hand, as the first forward pass showed it.

    Raises ConfigurationError where there is no such call, or it is not told which of several;
    `example` shows how to name one, as CALL.
    """
    module, number = named
    calls = [call for call in first.maps if (call.module, call.side) == (module, "output")]
    if not calls:
        raise ConfigurationError(
            f"module '{module}' gave no map (N, C, ...) in the first forward pass"
        )
    if number is None and len(calls) == 1:
        return calls[0]
    for call in calls:
        if call.call + 1 == number:
            return call
    numbers = ", ".join(str(call.call + 1) for call in calls)
    name = example.replace("CALL", str((module, calls[-1].call + 1)))
    was = f"has no call {number}" if number else "is called more than once"
    raise ConfigurationError(
        f"module '{module}' {was} in a forward pass (calls with a map: {numbers}); name one of "
        f"them: {name}"
    )


def _why_nothing_was_seen(first: "_FirstMaps") -> str:
    remedy = "name the maps with `taps=...`"
    if first.with_gradient:
        return f"no module shows the map of a convolution in the first forward pass; {remedy}"
    return (
        "the first forward pass ran without gradients: in checkpoint(..., use_reentrant=True), "
        "which use_reentrant=False replaces, in torch.no_grad(), or with every layer frozen; "
        f"change that, or {remedy}"
    )


class _FirstMaps:
    """What the first forward pass showed, at every call: the taps are known only after it."""

    def __init__(self) -> None:
        self.maps: dict[Call, dict[Reading, Tensor]] = {}
        self.gap: dict[Call, dict[Reading, Tensor]] = {}
        self.with_gradient = False

    @torch.no_grad()
    def see(self, call: Call, values: Tensor) -> None:
        _check_batch(call, values)
        readings: tuple[Reading, ...] = ("sum", "peak", "positive")
        channels = values.shape[1]
        self.with_gradient |= call.side == "output" and values.requires_grad
        self.maps[call] = {}
        self.gap[call] = {}
        for reading in readings:
            # As later passes are measured: a run that goes on makes its first pass again.
            active, gap = values.new_zeros(2, channels, dtype=torch.float32)
            add_activity_and_gap(values, reading, [active], gap)
            self.maps[call][reading], self.gap[call][reading] = active, gap
