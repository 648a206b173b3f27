"""Data parallelism: the processes that train one model together, and what they agree on.

A process is a rank of torch.distributed, started by `torchrun` or by `pgt-diag train --nproc`. The
first one writes the run directory and speaks to people.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pgt_diag.config import Device
from pgt_diag.errors import ConfigurationError, DivergedError, PeerError, PgtDiagError
from pgt_diag.parent import end_with_parent
from pgt_diag.parent import place as told_place

Value = TypeVar("Value")

_EXCHANGE_SECONDS = 0.25


@dataclass(frozen=True)
class Shard:
    """Which share of every batch is this process's: the `rank`-th of `world`."""

    rank: int = 0
    world: int = 1

    def of(self, indices: Tensor) -> Tensor:
        """Return this process's share of a batch's (B,) indices; shares differ by at most one."""
        return torch.tensor_split(indices, self.world)[self.rank]


ALL = Shard()


class World:
    """The processes that train together; all of them call every method that is not a property.

    One process alone is a world as well, and nothing then waits for anybody.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._joined = False
        self._left = 0
        self._exchanged = time.monotonic()
        self._interval = 1

    @classmethod
    def join(cls, device: Device = Device.AUTO, seconds: float = 600.0) -> Self:
        """Join the processes that the environment tells of, as torchrun sets it.

        seconds: so long a process waits for another one before it gives up.

        Raises ConfigurationError for an environment that torchrun would not have set, and for
        `device` cuda where this process has no GPU of its own; PeerError when the others are not
        there in time.
        """
        ours, place = told_place(), resolve_device(device)
        if ours.size == 1:
            return cls(0, 1, place)
        local = ours.local_rank
        if place.type == "cuda":
            gpus = torch.cuda.device_count()
            if local >= gpus:
                raise ConfigurationError(
                    f"process {local} of this machine has no GPU of its own, for there are {gpus}; "
                    'start fewer processes, or use `device="cpu"`'
                )
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        world = cls(ours.rank, ours.size, place)
        if not torch.distributed.is_initialized():
            end_with_parent()
            world._meet(seconds)
        return world

    def _meet(self, seconds: float) -> None:
        from pgt_diag.rendezvous import meet  # a torch that was built alone has no stores

        try:
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=meet(self.rank, self.size, seconds),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=seconds),
            )
        except torch.distributed.DistError as error:
            reason = str(error).partition("\n")[0][:200]
            raise PeerError(
                f"process {self.rank} does not reach the other {self.size - 1} ({reason})"
            ) from None
        self._joined = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        """Leave; what all processes end with is told by the first one only."""
        if self._joined and kind is None:
            torch.distributed.destroy_process_group()
        if self.size == 1 or error is None or isinstance(error, PeerError):
            return
        if is_of_a_peer(error):
            told = "another process of this run ended; go on with `resume=...`"
            told = "" if self.rank else told
            raise PeerError(told) from None
        if self.rank and isinstance(error, KeyboardInterrupt):
            raise PeerError("", exit_code=130) from None
        if self.rank and isinstance(error, PgtDiagError):
            known = isinstance(error, DivergedError)
            told = "" if known else f"process {self.rank}: {error}"
            raise PeerError(told, exit_code=error.exit_code) from None

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory and speaks to people."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """The share of the data that is this process's."""
        return Shard(self.rank, self.size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something that fails for all processes if it fails for one, with one message."""
        error: PgtDiagError | None = None
        try:
            yield
        except PgtDiagError as failed:
            error = failed
        if self.size > 1:
            told = self.gather((str(error), error.exit_code) if error else None)
            failures = [(rank, failure) for rank, failure in enumerate(told) if failure]
            if failures and (error is None or self.rank):
                rank, (message, code) = failures[0]
                raise PeerError("" if self.rank else f"process {rank}: {message}", exit_code=code)
        if error is not None:
            raise error

    def gather(self, value: Value) -> list[Value]:
        """Return everybody's value, by rank; plain values, tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Return what `make()` returns in the first process; in others it is not called.

        Raises, in all processes, the PgtDiagError that it raises.
        """
        values: list[Any] = [None]
        with self.together():
            if self.first:
                values = [make()]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values)
        value: Value = values[0]
        return value

    def on_each_machine(self, make: Callable[[], object]) -> None:
        """Call `make()` in the first process, then in one process of every other machine.

        What the first one made on a disk that they share is there for the others. Raises, in all
        processes, the PgtDiagError that it raises.
        """
        self.from_first(make)
        with self.together():
            if not self.first and told_place().local_rank == 0:
                make()

    def sum_(self, values: Tensor) -> Tensor:
        """Add up everybody's tensor, of the same shape, on the training device, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Put the first process's values into everybody's tensors, on the training device."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def exchange(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are set in any process; asked at every iteration, all with one answer.

        Only about four times a second the processes really ask each other: until then every answer
        is no. A flag has to stay set until it is answered.
        """
        if self.size == 1:
            return list(flags)
        self._left -= 1
        if self._left > 0:
            return [False] * len(flags)
        now = time.monotonic()
        each = (now - self._exchanged) / self._interval
        self._exchanged = now
        count = int(min(_EXCHANGE_SECONDS / max(each, 1e-6), 2.0 * self._interval)) or 1
        told = torch.tensor([*map(int, flags), count if self.first else 0])
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        *answers, self._interval = told.tolist()
        self._left = self._interval
        return [bool(answer) for answer in answers]

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model for the training step to call, which averages gradients."""
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def resolve_device(device: Device) -> torch.device:
    """Return the torch device; ConfigurationError when a GPU is asked for and absent."""
    if device is Device.AUTO:
        device = Device.CUDA if torch.cuda.is_available() else Device.CPU
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ConfigurationError("device is cuda and torch sees no CUDA GPU; use cpu or auto")
    return torch.device(device.value)


def is_of_a_peer(error: BaseException) -> bool:
    """Whether a collective operation failed: another process died, or did not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl"))
