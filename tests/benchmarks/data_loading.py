"""Where the time goes between an ImageNet folder and the network, and how two ways to it compare.

    python tests/benchmarks/data_loading.py [--device cuda --workers 16]

On JPEGs of ImageNet's size (500 × 375, about 55 kB) cut from scikit-learn's two photographs, at
224 px. Prints one JSON object. "stage_ms" is the CPU time of one image on one thread, stage by
stage, with the alternatives to each; "transfer" is its way from a loading process, CPU time of
both. "path_ms" is that of all stages: of ours in a loading process and with the normalising that
the training device does; of torchvision's reference (ImageFolder, v2 transforms on PIL images, all
of it in a loading process); and what is left to a loading process with `--decode gpu`. Blocks
alternate in one process; ratios, how many times as long as ours, are taken round by round.

With --device cuda also "cuda": images per second of torchvision's decoder alone, of decoding with
crops and resizes, and of whole epochs either way with so many workers, by the clock; and how far
apart the pixels of both are.
"""

import argparse
import io
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

sys.path.insert(0, str(Path(__file__).parents[2]))

from pgt_diag.bench import Spread, alternate, ratio
from pgt_diag.config import Augment, RunConfig
from pgt_diag.data.base import random_number
from pgt_diag.data.decoding import Encoded
from pgt_diag.data.folder import IMAGENET_MEAN, IMAGENET_STD, FolderData
from pgt_diag.data.images import decode, read_jpeg
from pgt_diag.data.views import training_view
from pgt_diag.distributed import ALL

SIZE = 224


def make_folder(root: Path, count: int) -> None:
    """Write photographs as ImageNet has them: most lie, some stand; quality 85 to 95."""
    dice = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for split in ("train", "val"):
        for label in range(2):
            place = root / split / str(label)
            place.mkdir(parents=True)
            for number in range(count // 2 if split == "train" else 1):
                size = (500, 375) if number % 4 else (375, 500)
                photograph = photographs[number % 2]
                share = dice.uniform(0.8, 1.0) * min(np.array(photograph.size) / size)
                wide, high = (int(side * share) for side in size)
                left = int(dice.integers(photograph.width - wide + 1))
                top = int(dice.integers(photograph.height - high + 1))
                box = (left, top, left + wide, top + high)
                image = photograph.resize(size, Image.Resampling.BICUBIC, box)
                image.save(place / f"{number}.jpg", quality=int(dice.integers(85, 96)))


def every(function: Callable[[Any], object], items: list[Any]) -> Callable[[], object]:
    return lambda: [function(item) for item in items]


def draft(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (SIZE, SIZE))
    return image.convert("RGB")


def stages(paths: list[str]) -> dict[str, Callable[[], object]]:
    contents = [Path(path).read_bytes() for path in paths]
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    pictures = list(map(decode, paths))
    keys = [random_number("augment", 0, 0, index) for index in range(len(paths))]
    views = [
        training_view(Augment.IMAGENET, SIZE, picture.size, key)
        for picture, key in zip(pictures, keys, strict=True)
    ]
    seen = list(zip(pictures, views, strict=True))
    whole = [(torch.from_numpy(np.array(picture)).permute(2, 0, 1), view) for picture, view in seen]
    square = [SIZE, SIZE]
    crops = [functional.resized_crop(picture, *view.box, square) for picture, view in seen]
    finished = [view.of_picture(picture) for picture, view in seen]
    batch = torch.stack(finished)
    mean, std = (
        torch.tensor([255 * value for value in values]).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return {
        "read": every(lambda path: Path(path).read_bytes(), paths),
        "header": every(lambda content: Image.open(io.BytesIO(content)), contents),
        "decode, Pillow": every(lambda content: Image.open(io.BytesIO(content)).load(), contents),
        "decode, Pillow with draft": every(draft, contents),
        "decode, torchvision": every(lambda one: decode_jpeg(one, ImageReadMode.RGB), tensors),
        "draw the crop": lambda: [
            training_view(Augment.IMAGENET, SIZE, picture.size, key)
            for picture, key in zip(pictures, keys, strict=True)
        ],
        "crop, resize and flip, ours": every(lambda each: each[1].of_picture(each[0]), seen),
        "crop, resize and flip of a tensor": every(lambda each: each[1].of(each[0]), whole),
        "crop and resize, PIL": every(
            lambda each: functional.resized_crop(each[0], *each[1].box, square), seen
        ),
        "PIL to tensor": every(functional.pil_to_tensor, crops),
        "flip": every(functional.horizontal_flip, finished),
        "collate": lambda: torch.stack(finished),
        "normalise": lambda: (batch - mean).div_(std),
    }


class Reference(Dataset):
    """torchvision's reference pipeline."""

    def __init__(self, root: Path) -> None:
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(SIZE),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        self.folder = torchvision.datasets.ImageFolder(root / "train", transform)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.folder[index]


def open_folder(root: Path, batch: int, device: torch.device, **options: Any) -> FolderData:
    config = RunConfig.from_mapping(
        {"dataset": "imagefolder", "data": str(root), "batch_size": batch, "workers": 0, **options}
    )
    return FolderData(config, device, ALL)


class Ready(Dataset):
    """Batches that take no time to make."""

    def __init__(self, batches: int, batch: int) -> None:
        self.batches = batches
        self.images = torch.zeros(batch, 3, SIZE, SIZE, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Tensor:
        return self.images


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def transfer(batch: int, rounds: int) -> float:
    """Return milliseconds an image: what many batches take longer than one."""
    parts = {
        str(count): every(len, DataLoader(Ready(count, batch), batch_size=None, num_workers=1))
        for count in (1, 21)
    }
    spent = alternate(parts, rounds=rounds, clock=cpu_seconds)
    extra = [a - b for a, b in zip(spent["21"], spent["1"], strict=True)]
    return 1e3 * Spread.of(extra).median / (20 * batch)


def quartiles(spent: dict[str, list[float]], name: str, to: str) -> list[float]:
    return [round(value, 3) for value in asdict(ratio(spent, name, to)).values()]


def epoch(data: FolderData, number: int = 0) -> None:
    for _ in data.train_batches(number):
        pass


def both_ways(
    root: Path, images: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    batch = min(options.batch, images)
    count = images // batch * batch
    ours = {
        way: open_folder(root, batch, device, decode=way, workers=options.workers)
        for way in ("cpu", "gpu")
    }
    data = ours["gpu"]
    samples = [data._images.load_encoded(0, index) for index in range(batch)]
    encoded, target, _ = zip(*samples, strict=True)
    whole = (Encoded.join(encoded), torch.stack(target), [])
    contents = [one.content for one in encoded]
    parts = {
        "decode": lambda: decode_jpeg(contents, ImageReadMode.RGB, device),
        "decode, crop and resize": lambda: data._decoder(whole),
    }
    epochs = {f"epochs, decode {way}": lambda each=each: epoch(each) for way, each in ours.items()}
    alternate({**parts, **epochs}, rounds=2, device=device)
    spent = alternate({**parts, **epochs}, rounds=options.rounds, device=device)
    pairs = zip(*(each.train_batches(0) for each in ours.values()), strict=True)
    levels = 255 * torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    apart = torch.stack([((a - b).abs() * levels).mean() for (a, _), (b, _) in pairs])
    for each in ours.values():
        each.close()
    return {
        "workers": options.workers,
        "images_per_second": {
            name: round((batch if name in parts else count) / Spread.of(seconds).median)
            for name, seconds in spent.items()
        },
        "gray_levels_apart": round(apart.mean().item(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=0, help="by default 64; 2,048 with cuda")
    parser.add_argument("--batch", type=int, default=256, help="on the GPU")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*TorchCodec", DeprecationWarning)
    on_gpu = options.device == "cuda"
    images = options.images or (2048 if on_gpu else 64)
    measured = min(images, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(root, images)
        ours = open_folder(root, measured, torch.device("cpu"))
        paths = ours._images.train.split.paths[:measured]
        reference = DataLoader(Reference(root), measured, sampler=range(measured))
        images_of = range(measured)
        load = ours._images.load
        paths_of = {
            "ours": lambda: torch.stack([load(0, index)[0] for index in images_of]),
            "ours, normalised": lambda: next(ours.train_batches(0)),
            "reference": lambda: next(iter(reference)),
            "ours, decode gpu": every(lambda one: ours._images.load_encoded(0, one), images_of),
        }
        parts = stages(paths)
        alternate({**parts, **paths_of}, rounds=1)
        spent = alternate({**parts, **paths_of}, rounds=options.rounds, clock=time.thread_time)
        # Half of the images are mirrored.
        resized = zip(
            *map(spent.get, ("crop and resize, PIL", "PIL to tensor", "flip")), strict=True
        )
        spent["with PIL"] = [resize + turn + flip / 2 for resize, turn, flip in resized]
        each = {name: Spread.of(seconds) * (1e3 / measured) for name, seconds in spent.items()}
        result = {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "load_before": busy,
            "bytes_per_image": round(np.mean([Path(path).stat().st_size for path in paths])),
            "encoded": sum(read_jpeg(path) is not None for path in paths) / len(paths),
            "rounds": options.rounds,
            "stage_ms": {name: round(each[name].median, 3) for name in parts}
            | {"transfer": round(transfer(measured, options.rounds), 3)},
            "path_ms": {name: round(each[name].median, 3) for name in paths_of},
            "times_reference": quartiles(spent, "reference", "ours"),
            "times_reference_normalised": quartiles(spent, "reference", "ours, normalised"),
            "times_decode_gpu": quartiles(spent, "ours", "ours, decode gpu"),
            "times_PIL_resize": quartiles(spent, "with PIL", "crop, resize and flip, ours"),
        }
        if on_gpu:
            torch.set_num_threads(threads)
            result["cuda"] = both_ways(root, images, options, torch.device("cuda"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
