"""A CUDA graph's likeness on the CPU: what operations do to memory is done again, and no Python.

Like a CUDA graph it knows addresses only: an operation that is repeated reads and writes the
memory that it read and wrote when it was captured. Unlike one it does what it captures; so what
has been there before is put back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
"""What would wait for the device, and so cannot be captured."""


class MemoryGraph(TorchDispatchMode):
    """Keeps every operation that is done under it, with the tensors it takes and makes."""

    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, dict[str, Any], list[Any]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> "MemoryGraph":
        MemoryGraph.capturing = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        MemoryGraph.capturing = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in FORBIDDEN:
            raise RuntimeError(f"operation {name} not permitted when stream is capturing")
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        # Batch norm's schema does not say that it moves the running statistics.
        for tensor in inputs if function._schema.is_mutable or "batch_norm" in name else ():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                whole = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
                self.before[storage.data_ptr()] = (whole, whole.clone())
        result = function(*args, **kwargs)
        made = tree_flatten(result)[0]
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        kept = [
            each
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in memory
            else None
            for each in made
        ]
        self.operations.append((function, args, kwargs, kept))
        return result

    def put_back(self) -> None:
        for tensor, values in self.before.values():
            tensor.copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, kept in self.operations:
            for place, value in zip(kept, tree_flatten(function(*args, **kwargs))[0], strict=True):
                if place is not None:
                    place.copy_(value)


class MemoryCapture:
    """Captures an iteration as a MemoryGraph (`pgt_diag.graph.Capture`)."""

    captured = 0

    def warm_up(self, make: Callable[[], Tensor]) -> Tensor:
        return make()

    def capture(self, make: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, random = MemoryGraph(), torch.get_rng_state()
        try:
            with graph:
                result = make()
        finally:
            graph.put_back()
            torch.set_rng_state(random)
        MemoryCapture.captured += 1
        return graph.replay, result
