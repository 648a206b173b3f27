"""Small runs in float64: in one process, or shared by several (`torchrun ranks.py FOLDER CASES`).

In float64 the order of additions does not matter to 1e-12, as it does in float32.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgt_diag import training
from pgt_diag.config import Norm, RunConfig
from pgt_diag.distributed import World
from pgt_diag.errors import PeerError
from pgt_diag.parent import leave
from pgt_diag.recorder import FilterRecorder
from pgt_diag.resuming import resume_point

VALUES = {
    "batch_size": 24,
    "epochs": 4,
    "lr": 0.02,
    "warmup_epochs": 1.0,
    "device": "cpu",
    "feature_map_snapshots": 2,
    "min_spell": 2,
}


class SmallNet(nn.Module):
    """A residual network of 16 filters; the biases make some of them flicker, and some silent."""

    def __init__(self, norm: Norm = Norm.NONE) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8) if norm is Norm.BATCH else nn.Identity()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(8, 10)
        nn.init.constant_(self.conv1.bias, 0.0)
        with torch.no_grad():
            self.conv1.bias.copy_(torch.linspace(-1.5, 0.0, 8))
            self.conv2.bias.copy_(torch.linspace(-1.5, 0.0, 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(images)))
        x = self.relu(self.conv2(x) + x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    build, dtype, threads = training.build_model, torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    training.build_model = lambda *_, **options: SmallNet(options["norm"])  # type: ignore[assignment]
    try:
        yield
    finally:
        training.build_model = build
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def train(
    path: Path, values: dict[str, Any], stop_at: int | None = None, world: World | None = None
) -> None:
    """Make a run, or go on with the one that is there, until about `stop_at` iterations."""
    world = world or World(0, 1, torch.device("cpu"))
    point = world.from_first(lambda: resume_point(path) if path.exists() else None)
    calls = count()
    with in_float64(), contextlib.suppress(KeyboardInterrupt):
        training.train(
            RunConfig.from_mapping({**VALUES, **values}),
            path,
            resume=point,
            stop=lambda: stop_at is not None and next(calls) >= stop_at,
            world=world,
        )


def record_own_loop(path: Path, world: World) -> None:
    """Record a loop with a model in torch's own wrapper.

    Filter 0 is silent on the first process's images and not on the second's, filter 1 on all.
    """
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, -1.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    images = torch.full((3, 1, 1, 1), -1.0 if world.rank == 0 else 2.0)
    with FilterRecorder(model, path, optimizer=optimizer) as recorder:
        for _ in range(5):
            optimizer.zero_grad()
            loss = wrapped(images).square().mean()
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()


def record_scaled_loop(path: Path, world: World) -> None:
    """Record a loop whose scaled loss overflows in the second process alone, at first.

    Writes what every process saw beside the run: steps skipped, and the weights at the end.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    wrapped = nn.parallel.DistributedDataParallel(model)
    images = torch.full((3, 1, 1, 1), 1e-3 if world.rank == 0 else 1e2)
    skipped, overflowed = [], []
    with FilterRecorder(model, path, optimizer=optimizer) as recorder:
        for _ in range(24):
            optimizer.zero_grad()
            loss = wrapped(images).square().mean()
            before, scale = model[3].weight.clone(), scaler.get_scale()
            overflowed.append(not torch.isfinite(loss.detach() * scale).item())
            scaler.scale(loss).backward()
            recorder.log(loss=loss)
            scaler.step(optimizer)
            scaler.update()
            skipped.append(before.equal(model[3].weight))
    told = world.gather((skipped, overflowed, model[3].weight.tolist()))
    if world.first:
        path.with_suffix(".json").write_text(json.dumps(told))


def note_calls(path: Path, world: World) -> None:
    """Write down which process does what each machine needs once: of one machine, and of two."""
    for local in (world.rank, 0):
        os.environ["LOCAL_RANK"] = str(local)
        world.on_each_machine(lambda: path.open("a").write(f"{world.rank}\n"))


def main(folder: Path, cases: dict[str, Any]) -> None:
    with contextlib.suppress(PeerError), World.join() as world:
        for name, case in cases.items():
            train(folder / name, case["values"], case.get("stop_at"), world)
        record_own_loop(folder / "own loop", world)
        record_scaled_loop(folder / "scaled", world)
        note_calls(folder / "calls.txt", world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
