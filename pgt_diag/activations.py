"""Which activation follows which convolution, and where a hook can see its map.

Found once, from the autograd graph of one forward pass: the graph knows about shared, in-place
and functional activations and about the addition before a residual block's last ReLU, where
module names and module order do not. Nodes are matched with module calls, because a module (the
one ReLU of a torchvision BasicBlock) may be called several times.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgt_diag.reductions import Reading

Node = Any
"""torch.autograd.graph.Node; its classes are not public."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Activations and what may stand before them, by the names of their autograd nodes.
_ACTIVATIONS = frozenset(
    {
        "EluBackward0",
        "GeluBackward0",
        "HardsigmoidBackward0",
        "HardswishBackward0",
        "HardtanhBackward0",
        "LeakyReluBackward0",
        "LeakyReluBackward1",
        "MishBackward0",
        "PreluKernelBackward0",
        "ReluBackward0",
        "SigmoidBackward0",
        "SiluBackward0",
        "SoftplusBackward0",
        "TanhBackward0",
        "ThresholdBackward0",
        "_MarkingReLUBackward",
    }
)
# Channel c in, channel c out: between a convolution and its activation, the map keeps its filters.
_CHANNEL_PRESERVING = frozenset(
    {
        "AddBackward0",
        "AvgPool2DBackward0",
        "CloneBackward0",
        "CudnnBatchNormBackward0",
        "DivBackward0",
        "MaxPool2DWithIndicesBackward0",
        "MiopenBatchNormBackward0",
        "MulBackward0",
        "NativeBatchNormBackward0",
        "NativeGroupNormBackward0",
        "NativeDropoutBackward0",
        "SubBackward0",
        "SyncBatchNormBackward",
        "ToCopyBackward0",
        "ViewBackward0",  # instance norm; a view that mixes channels changes their number
    }
)


@dataclass(frozen=True)
class Call:
    """The `call`-th call (from 0) of a module in a forward pass, and one side of it."""

    module: str
    call: int
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Tap:
    """Where a hook reads a convolution's post-activation map, and how."""

    where: Call
    reading: Reading
    addition: bool | None = None
    """Whether another map is added between the convolution and its activation, if that is known."""

    def __str__(self) -> str:
        """Return it for people: `output of layer1.0.relu, call 2`."""
        again = f", call {self.where.call + 1}" if self.where.call else ""
        before = " before its ReLU" if self.reading == "positive" else ""
        return f"{self.where.side} of {self.where.module}{again}{before}"


class Hook:
    """A module hook that torch.compile leaves as it is: traced, it would be compiled for each call.

    It stays behind when its model is copied or saved: there it does nothing.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function: Any = torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self._function(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(_do_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_do_nothing,)


def _do_nothing(*_: Any) -> None: ...


class ActivationFinder:
    """Watches one forward pass under autograd and then names a tap for every convolution.

    Call `start()`, run one forward pass, then `stop()` and `taps()`. `see(call, map)` is called
    for every map on the way, so that the watched pass itself can be measured.
    """

    def __init__(self, model: nn.Module, see: Callable[[Call, Tensor], None]) -> None:
        self._see = see
        self._modules: dict[str, Any] = {n: module for n, module in model.named_modules() if n}
        self._seen: dict[Node, list[tuple[Call, int]]] = {}
        self._convolution_calls: dict[str, list[Node]] = {}
        self._calls: dict[str, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Put the hooks on."""
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(Hook(self._input_hook(name))))
            self._handles.append(module.register_forward_hook(Hook(self._output_hook(name))))

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def taps(self, output: Any) -> dict[str, tuple[Tap, ...]]:
        """Return the taps of every convolution whose map can be seen, by its qualified name.

        `output` is what the model returned: tensors, or containers of them. A convolution that is
        called several times has a tap for each call. Where no activation follows, the tap is the
        convolution's own output. A convolution is left out when a call of it cannot be followed:
        a frozen one has no place in the graph, and no module may show its activation's map.
        """
        roots = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
        consumers = _consumers([*roots, *self._seen])
        found = {
            name: [self._tap(name, call, node, consumers) for call, node in enumerate(nodes)]
            for name, nodes in self._convolution_calls.items()
        }
        return {
            name: tuple(tap for tap in taps if tap is not None)
            for name, taps in found.items()
            if None not in taps
        }

    def is_compiled(self, output: Any) -> bool:
        """Whether torch.compile made the watched pass: its graph does not show single operations.

        `output` is what the model returned.
        """
        roots = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
        return any("CompiledFunction" in node.name() for node in [*roots, *_consumers(roots)])

    def _tap(
        self, name: str, call: int, node: Node | None, consumers: dict[Node, list[Node]]
    ) -> Tap | None:
        if node is None:
            return None
        found = _first_activation(node, consumers)
        if found is None:
            return Tap(Call(name, call, "output"), "peak")
        activation, before, addition = found
        filters = self._modules[name].out_channels
        for seen, channels in self._seen.get(activation, ()):
            if channels == filters:
                return Tap(seen, "sum" if _is_relu(activation) else "peak", addition)
        for seen, channels in self._seen.get(before, ()):
            if _is_relu(activation) and channels == filters:
                return Tap(seen, "positive", addition)
        return None

    def _input_hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and _is_map(inputs[0]):
                self._note(inputs[0], Call(name, self._calls.get(name, 0), "input"))

        return hook

    def _output_hook(self, name: str) -> Any:
        is_convolution = isinstance(self._modules[name], CONVOLUTIONS)

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if is_convolution:
                self._convolution_calls.setdefault(name, []).append(output.grad_fn)
            if _is_map(output):
                self._note(output, Call(name, call, "output"))

        return hook

    def _note(self, tensor: Tensor, call: Call) -> None:
        self._see(call, tensor)
        if tensor.grad_fn is not None:
            self._seen.setdefault(tensor.grad_fn, []).append((call, tensor.shape[1]))


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Return the convolutions that are recorded, by qualified name, in module order."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, CONVOLUTIONS)
    }


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point()


def _is_relu(activation: Node) -> bool:
    """Whether the activation is 0 exactly where its input is not positive (ReLU, ReLU6)."""
    if activation.name() == "HardtanhBackward0":
        return bool(activation._saved_min_val == 0)
    return activation.name() in ("ReluBackward0", "_MarkingReLUBackward")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _consumers(roots: Iterable[Node]) -> dict[Node, list[Node]]:
    """Return, for every autograd node below the roots, the nodes that take its output."""
    consumers: dict[Node, list[Node]] = {}
    waiting, visited = list(roots), set(roots)
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            consumers.setdefault(below, []).append(node)
            if below not in visited:
                visited.add(below)
                waiting.append(below)
    return consumers


def _first_activation(
    node: Node, consumers: dict[Node, list[Node]]
) -> tuple[Node, Node, bool | None] | None:
    """Return the nearest activation after `node`, and the node whose output it takes.

    And whether another map is added on the way; None where that cannot be told.
    """
    waiting: deque[tuple[Node, bool | None]] = deque([(node, False)])
    visited = {node}
    while waiting:
        before, added = waiting.popleft()
        for after in consumers.get(before, ()):
            if after.name() in _ACTIVATIONS:
                return after, before, added
            if after.name() in _CHANNEL_PRESERVING and after not in visited:
                visited.add(after)
                waiting.append((after, any_known([added, _adds_maps(after)])))
    return None


def _adds_maps(node: Node) -> bool | None:
    """Whether a node adds maps of one shape; None for a number, or a map without a gradient."""
    if node.name() not in ("AddBackward0", "SubBackward0"):
        return False
    if any(below is None for below, _ in node.next_functions):
        return None
    shape = node._input_metadata[0].shape
    return all(below._input_metadata[i].shape == shape for below, i in node.next_functions)


def any_known(answers: Iterable[bool | None]) -> bool | None:
    """Return whether one of the answers is yes; None where none is, and one is not known."""
    answers = set(answers)
    if True in answers:
        return True
    return None if None in answers else False
