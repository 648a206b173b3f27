"""One iteration of `pgt-diag train`, recording on, against loops that record nothing.

    python tests/benchmarks/training_step.py [--threads 1] [--device cuda] [--size 224 --batch 256]

Ours is `pgt_diag.train` itself, as it is, on synthetic colour images with crops and flips.
"reference" trains as torchvision's reference script does: DataLoader, v2 transforms image by image,
SGD with its defaults, on a GPU fp16 autocast with a GradScaler, loss and accuracy by `.item()`.
"ready" is the same with its batches ready on the device; "barest" also without the metrics. All
train non-BN ResNet-18 on the same images, in blocks that alternate, each loop in a process of its
own: ours sets its process's allocator. Prints one JSON object; ratios are how many times as long as
ours the others take. With --cpu-time it is the CPU time of all of a process's threads, which other
load disturbs less, and which charges ours with the writer thread too.
Goals (issue 5): 1.05 times for the reference on a CPU, 2 on a GPU, 1.3 there at 224 px.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[2]))

import pgt_diag.training
from pgt_diag.bench import Spread, matmul_rate, ratio
from pgt_diag.config import RunConfig, Stem
from pgt_diag.cost import flops_per_image
from pgt_diag.data.memory import RawImages, channel_statistics
from pgt_diag.data.sources import read_images
from pgt_diag.models import build_model
from pgt_diag.progress import Listener, Progress

SETTINGS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
LOOPS = ("ours", "reference", "ready", "barest")
WARM_UP = 4
"""Iterations before the first block: ours captures its step in the fourth."""


class Blocks:
    """Makes a block of iterations for every line on standard input, and prints its seconds."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.steps, self.device = options.steps, device
        self.left, self.began = WARM_UP, 0.0

    def made_one(self) -> bool:
        """Call it after every iteration; it returns whether there should be another."""
        self.left -= 1
        if self.left:
            return True
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        print(self.clock() - self.began, flush=True)
        more = bool(sys.stdin.readline())
        self.left, self.began = self.steps, self.clock()
        return more


class Ours(Listener):
    """Has `pgt_diag.train` make blocks."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def iterated(self, progress: Progress) -> None:
        if not self.blocks.made_one():
            raise KeyboardInterrupt


class Images(Dataset):
    """Images as torchvision's CIFAR-10 gives them."""

    def __init__(self, raw: RawImages) -> None:
        mean, std = channel_statistics(raw.train_images)
        self.images = raw.train_images.permute(0, 2, 3, 1).contiguous().numpy()
        self.target = raw.train_target.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(raw.train_images.shape[-1], padding=4),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.target[index]


def endless(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for images, target in loader:
            yield images.to(device), target.to(device)


def stepper(
    batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, stem: str, *, metrics: bool
) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, stem=Stem(stem)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def step() -> Any:
        images, target = next(batches)
        with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
            output = model(images)
            loss = F.cross_entropy(output, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if metrics:
            top = output.topk(5)[1] == target[:, None]
            return loss.item(), top[:, 0].float().mean().item(), top.float().mean().item()
        return None

    return step


def settings(options: argparse.Namespace) -> RunConfig:
    # One epoch that outlasts the measurement: no evaluation falls into a block.
    return RunConfig.from_mapping(
        {
            "dataset": "synthetic",
            "synthetic_images": options.batch * (options.steps * (options.rounds + 2) + WARM_UP),
            "image_size": options.size,
            "stem": options.stem,
            "augment": "small",
            "epochs": 1,
            "warmup_epochs": 0,
            "schedule": "constant",
            "lr": SETTINGS["lr"],
            "batch_size": options.batch,
            "device": options.device,
            "threads": options.threads,
            "feature_map_snapshots": 1,
            "checkpoint_every": 10**9,
        }
    )


def serve(options: argparse.Namespace, device: torch.device) -> None:
    """Make blocks of the loop that `options.loop` names."""
    config, blocks = settings(options), Blocks(options, device)
    if options.loop == "ours":
        with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
            pgt_diag.training.train(config, Path(folder) / "run", listener=Ours(blocks))
        return
    torch.backends.cudnn.benchmark = True  # as torchvision's script has it
    loader = DataLoader(
        Images(read_images(config)),
        options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers if options.loop == "reference" else min(options.workers, 4),
        pin_memory=device.type == "cuda",
    )
    batches = endless(loader, device)
    if options.loop != "reference":
        batches = itertools.cycle(list(itertools.islice(batches, 8)))
    step = stepper(batches, device, options.stem, metrics=options.loop != "barest")
    more = True
    while more:
        step()
        more = blocks.made_one()


class Process:
    """This script once more, making the blocks of one loop."""

    def __init__(self, script: str, loop: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, script, *sys.argv[1:], f"--loop={loop}"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def wait(self) -> None:
        if not self.process.stdout.readline():
            sys.exit(f"{self.process.args[-1]} did not start")

    def block(self) -> float:
        self.process.stdin.write("\n")
        return float(self.process.stdout.readline())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, default=32, help="image size, pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--stem", default="imagenet", choices=("imagenet", "small"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="iterations in a block")
    parser.add_argument("--workers", type=int, default=0, help="of the reference's DataLoader")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="with --workers 0")
    parser.add_argument(
        "--loops", nargs="+", choices=LOOPS[1:], default=LOOPS[1:], help="beside ours"
    )
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.loop:
        serve(options, device)
        return
    before = os.getloadavg()[0]
    names = ("ours", *options.loops)
    loops = {name: Process(__file__, name) for name in names}
    for each in loops.values():
        each.wait()
    spent: dict[str, list[float]] = {name: [] for name in names}
    for index in range(options.rounds + 1):
        for name in names[:: -1 if index % 2 else 1]:
            seconds = loops[name].block()
            if index:  # the first round still finds its memory
                spent[name].append(seconds)
    for each in loops.values():
        each.end()
    model = build_model("resnet18", num_classes=10, stem=Stem(options.stem))
    flops = flops_per_image(model, options.size)
    rate = options.batch * options.steps / Spread.of(spent["ours"]).median
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": options.threads,
        "workers": options.workers,
        "cpu_time": options.cpu_time,
        "load_before": before,
        "size": options.size,
        "stem": options.stem,
        "batch": options.batch,
        "rounds": options.rounds,
        "iterations_per_block": options.steps,
        "ms": {
            name: round(1e3 * Spread.of(seconds).median / options.steps, 2)
            for name, seconds in spent.items()
        },
        **{
            f"times_{name}": [
                round(value, 3) for value in asdict(ratio(spent, name, "ours")).values()
            ]
            for name in options.loops
        },
    }
    if not options.cpu_time:
        result |= {
            "images_per_second": round(rate, 1),
            "gflops": round(flops * rate / 1e9, 1),
            "share_of_matmul_rate": round(flops * rate / matmul_rate(device, 2.0), 3),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
