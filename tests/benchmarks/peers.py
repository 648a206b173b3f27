"""What recording costs beside other ways to watch the same filters at every step.

    python tests/benchmarks/peers.py [--device cuda] [--size 224 --batch 256]

The same network is trained in turn by a plain loop, with our recorder, with a loop that reads every
filter's norms by `.tolist()` and silent channels by `any`, with TensorBoard's histograms of weights
and gradients, and with `wandb.watch(log="all", log_freq=1)`, offline. wandb and TensorBoard keep
histograms per layer, not norms and silence per filter; both are asked for every step. Prints one
JSON object: each one's overhead over the plain step, in percent, and how many times ours it is.
What is left to write at the end of a block is written before the next, untimed, for ours only.
Goals (issue 5): 20 times less than wandb and TensorBoard; 2.5 times less than the reading loop.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import pgt_diag
from pgt_diag.bench import Spread, alternate, training_step
from pgt_diag.config import RunConfig
from pgt_diag.models import build_model
from pgt_diag.step import build_optimizer

NEEDED = ("wandb", "tensorboard")


class Network:
    """One of the networks that are trained in turn, all alike at the start."""

    def __init__(self, images: Tensor, target: Tensor) -> None:
        torch.manual_seed(0)
        self.model = build_model("resnet18", num_classes=10).to(images.device).train()
        self.optimizer = build_optimizer(self.model, RunConfig(lr=1e-3))
        self.step = training_step(self.model, self.optimizer, images, target)
        self.convolutions = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d)
        }


Step = Callable[[], None]


@contextlib.contextmanager
def plain(network: Network, folder: Path) -> Iterator[tuple[Step, Step]]:
    yield network.step, lambda: None


@contextlib.contextmanager
def ours(network: Network, folder: Path) -> Iterator[tuple[Step, Step]]:
    recorder = pgt_diag.FilterRecorder(network.model, folder / "run", optimizer=network.optimizer)
    with recorder:
        yield network.step, recorder.flush


@contextlib.contextmanager
def reading_loop(network: Network, folder: Path) -> Iterator[tuple[Step, Step]]:
    rows: list[dict[str, Any]] = []
    silent: dict[str, list[bool]] = {}

    def look(name: str, output: Tensor) -> None:
        silent[name] = (~(output.relu() != 0).any(dim=(0, 2, 3))).tolist()

    for name, module in network.convolutions.items():
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))

    def step() -> None:
        network.step()
        row: dict[str, Any] = {"silent": dict(silent)}
        for name, module in network.convolutions.items():
            weight = module.weight.detach()
            row[name] = weight.flatten(1).norm(dim=1).tolist()
            row[f"{name}.gradient"] = module.weight.grad.flatten(1).norm(dim=1).tolist()
        rows[:] = [row]

    yield step, lambda: None


@contextlib.contextmanager
def tensorboard(network: Network, folder: Path) -> Iterator[tuple[Step, Step]]:
    from torch.utils.tensorboard import SummaryWriter

    count = 0
    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def step() -> None:
            nonlocal count
            network.step()
            for name, parameter in network.model.named_parameters():
                writer.add_histogram(name, parameter, count)
                writer.add_histogram(f"{name}.gradient", parameter.grad, count)
            count += 1

        yield step, lambda: None


@contextlib.contextmanager
def wandb(network: Network, folder: Path) -> Iterator[tuple[Step, Step]]:
    import wandb as package

    settings = package.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
    with package.init(project="peers", dir=str(folder), settings=settings) as run:
        run.watch(network.model, log="all", log_freq=1)

        def step() -> None:
            network.step()
            run.log({})

        yield step, lambda: None


WAYS = (plain, ours, reading_loop, tensorboard, wandb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=32, help="image size, pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="steps in a block")
    parser.add_argument("--ways", nargs="*", default=[way.__name__ for way in WAYS])
    options = parser.parse_args()
    needed = set(NEEDED) & set(options.ways)
    missing = [name for name in sorted(needed) if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} missing: python -m pip install {' '.join(missing)}")
    device = torch.device(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    target = torch.randint(10, (options.batch,), device=device)
    before = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        blocks: dict[str, Callable[[], object]] = {}
        flushes = []
        for way in WAYS:
            if way.__name__ in options.ways:
                step, flush = stack.enter_context(way(Network(images, target), folder))
                flushes.append(flush)
                blocks[way.__name__] = lambda step=step: [step() for _ in range(options.steps)]
        alternate(blocks, rounds=1, device=device)
        spent = alternate(
            blocks,
            rounds=options.rounds,
            between=lambda: [flush() for flush in flushes],
            device=device,
        )
    overheads = {
        name: Spread.of([100 * (a / b - 1) for a, b in zip(seconds, spent["plain"], strict=True)])
        for name, seconds in spent.items()
        if name != "plain"
    }
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": before,
        "size": options.size,
        "batch": options.batch,
        "rounds": options.rounds,
        "steps_per_block": options.steps,
        "plain_step_ms": round(1e3 * Spread.of(spent["plain"]).median / options.steps, 2),
        "overhead_percent": {
            name: [round(value, 2) for value in asdict(overhead).values()]
            for name, overhead in overheads.items()
        },
        "times_ours": {
            name: round(overhead.median / overheads["ours"].median, 2)
            for name, overhead in overheads.items()
            if name != "ours"
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
