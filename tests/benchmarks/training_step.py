"""One iteration of `pgt-diag train`, recording on, against two loops that record nothing.

    python tests/benchmarks/training_step.py [--threads 1] [--device cuda]

Ours is `pgt_diag.train` itself, as it is, on synthetic 32 px colour images with crops and flips; it
runs in a thread of its own that is held after each iteration. "reference" trains as torchvision's
reference script does: DataLoader, v2 transforms image by image, SGD with its defaults, loss and
accuracy by `.item()`. "barest" has its batches ready in memory, SGD with its defaults and no
metrics. All three train non-BN ResNet-18 on the same images. Prints one JSON object; ratios are how
many times as long as ours the others take. With --threads 1 and no workers the time is the CPU time
of all threads, which other load disturbs less, and which charges ours with the writer thread too.
Goal (issue 5): 1.05 times for the reference.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
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
from pgt_diag.bench import Spread, alternate, ratio
from pgt_diag.config import RunConfig
from pgt_diag.data.memory import RawImages, channel_statistics
from pgt_diag.data.sources import read_images
from pgt_diag.models import build_model
from pgt_diag.progress import Listener, Progress

SETTINGS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


class Ours(Listener):
    """`pgt_diag.train` in a thread, an iteration at a time."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.go, self.done, self.over = threading.Semaphore(0), threading.Semaphore(0), False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.train, args=(config, folder), daemon=True)
        self.thread.start()
        self.wait()

    def train(self, config: RunConfig, folder: Path) -> None:
        try:
            with suppress(KeyboardInterrupt):
                pgt_diag.training.train(config, folder, listener=self, stop=lambda: self.over)
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def iterated(self, progress: Progress) -> None:
        self.done.release()
        self.go.acquire()

    def wait(self) -> None:
        self.done.acquire()
        if not self.over and not self.thread.is_alive():
            raise RuntimeError("training ended too soon") from self.error

    def step(self) -> None:
        self.go.release()
        self.wait()

    def close(self) -> None:
        self.over = True
        self.go.release()
        self.thread.join()


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
    batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, *, metrics: bool
) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)

    def step() -> Any:
        images, target = next(batches)
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            output = model(images)
            loss = F.cross_entropy(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if metrics:
            top = output.topk(5)[1] == target[:, None]
            return loss.item(), top[:, 0].float().mean().item(), top.float().mean().item()
        return None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="iterations in a block")
    parser.add_argument("--workers", type=int, default=0, help="of the reference's DataLoader")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    before = os.getloadavg()[0]
    # One epoch that outlasts the measurement: no evaluation falls into a block.
    config = RunConfig.from_mapping(
        {
            "dataset": "synthetic",
            "synthetic_images": options.batch * options.steps * (options.rounds + 3),
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
    data = Images(read_images(config))
    loader = DataLoader(
        data, options.batch, shuffle=True, drop_last=True, num_workers=options.workers
    )
    ready = list(itertools.islice(endless(loader, device), 8))
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config, Path(folder) / "run")
        loops = {
            "ours": ours.step,
            "reference": stepper(endless(loader, device), device, metrics=True),
            "barest": stepper(itertools.cycle(ready), device, metrics=False),
        }
        blocks = {
            name: lambda step=step: [step() for _ in range(options.steps)]
            for name, step in loops.items()
        }
        alternate(blocks, rounds=1, device=device)
        alone = options.threads == 1 and options.workers == 0
        clock = time.process_time if alone else time.perf_counter
        spent = alternate(blocks, rounds=options.rounds, device=device, clock=clock)
        ours.close()
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": options.threads,
        "workers": options.workers,
        "load_before": before,
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
            for name in ("reference", "barest")
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
