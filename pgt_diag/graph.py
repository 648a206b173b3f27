"""One iteration captured as a CUDA graph, and replayed: no Python and no launches in between."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Iterate = Callable[..., Tensor]

WARM_UP = 3
"""Iterations made as they are first: they make the momentum, and have cuDNN choose its kernels."""


class Capture(Protocol):
    """How an iteration is captured; tests have one that needs no GPU."""

    def warm_up(self, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make()` does, made where the capture will be."""

    def capture(self, make: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return a function that does again what `make()` did to tensors, and the result's place.

        `make` is called, but what it does is not done. Raises RuntimeError when it does something
        that cannot be captured, such as waiting for the device.
        """


class CudaCapture:
    """Captures on a stream of its own.

    Source: torch's notes on CUDA semantics, "Whole-network capture".
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make()` does; see `Capture.warm_up`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = make()
        current.wait_stream(self._stream)
        return result

    def capture(self, make: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture `make()`; see `Capture.capture`."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: the writer, and a loader's, wait for events of their own meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = make()
        return graph.replay, result


class GraphedStep:
    """Makes iterations: the first ones as they are, the others by replaying a captured one.

    `iterate(*parts)` makes an iteration on the tensors of a batch, which have the same shapes every
    time. `replayed()` is called after every replay; `failed(reason)` when the iteration cannot be
    captured, and all are then made as they are.
    """

    def __init__(
        self,
        iterate: Iterate,
        capture: Capture,
        *,
        replayed: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self._iterate = iterate
        self._capture: Capture | None = capture
        self._replayed = replayed
        self._failed = failed
        self._made = 0
        self._parts: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._result = torch.empty(0)

    def __call__(self, *parts: Tensor) -> Tensor:
        """Make one iteration; return what `iterate` does, in memory that the next one overwrites.

        parts: the tensors of a batch, on the device.
        """
        if self._capture is None:
            return self._iterate(*parts)
        if self._made < WARM_UP:
            self._made += 1
            return self._capture.warm_up(lambda: self._iterate(*parts))
        if self._replay is None and (reason := self._try(self._capture, parts)):
            self._capture, self._parts = None, []
            self._failed(reason)
        if self._replay is None:
            return self._iterate(*parts)
        if parts:
            torch._foreach_copy_(self._parts, list(parts))
        self._replay()
        self._replayed()
        return self._result

    def _try(self, capture: Capture, parts: Sequence[Tensor]) -> str | None:
        """Capture the iteration; return why that was not possible.

        By now nothing holds the memory of an iteration that failed: its error is gone.
        """
        self._parts = [part.clone() for part in parts]
        try:
            self._replay, self._result = capture.capture(lambda: self._iterate(*self._parts))
        except RuntimeError as error:
            return str(error).partition("\n")[0] or type(error).__name__
        return None
