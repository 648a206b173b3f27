"""Work for the GPU beside what it trains on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class SideStream:
    """A CUDA stream beside the current one; on a CPU there is none, and everything runs at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def used(self) -> AbstractContextManager[Any]:
        """Return the context in which kernels go to this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """Return an event that ends what the stream has been given so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self) -> None:
        """Wait, on the CPU, until the stream has nothing left to do."""
        if self._stream is not None:
            self._stream.synchronize()

    def hand_over(self, tensor: Tensor, made: torch.cuda.Event | None) -> Tensor:
        """Return a tensor of this stream, made when `made` is past, for use on the current one."""
        if made is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            tensor.record_stream(current)
        return tensor


def ahead(make: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Yield `make(item)` of every item; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        made: Future[_Out] | None = None
        for item in items:
            following = thread.submit(make, item)
            if made is not None:
                yield made.result()
            made = following
        if made is not None:
            yield made.result()
