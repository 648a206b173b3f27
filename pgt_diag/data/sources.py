"""The small data sets: scikit-learn's digits, IDX files, torchvision's CIFAR, and made-up ones."""

import gzip
import importlib.util
import math
import struct
import tarfile
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from pgt_diag.config import DatasetName, RunConfig
from pgt_diag.data.base import seeded
from pgt_diag.data.memory import RawImages
from pgt_diag.errors import ConfigurationError, DataError
from pgt_diag.preflight import (
    check_folder_use,
    check_synthetic,
    data_folder,
    download_folder,
    find_fashion_mnist,
    no_cifar,
)

_DIGITS = 10
_DIGITS_SHAPE = (1797, 65)  # 64 pixels and the label
_DEFLATE_LIMIT = 1032  # no deflate stream expands more than this
_SYNTHETIC_SIZE = 32


def read_images(config: RunConfig, *, download: bool = False) -> RawImages:
    """Read the in-memory data set that a configuration names.

    Raises DataError when files are missing or damaged, and ConfigurationError when the
    configuration names a folder for a data set that has none.
    """
    dataset = config.dataset
    match dataset:
        case DatasetName.DIGITS | DatasetName.SYNTHETIC:
            check_folder_use(config)
            return read_digits() if dataset is DatasetName.DIGITS else make_synthetic(config)
        case DatasetName.FASHION_MNIST:
            return read_fashion_mnist(data_folder(config), download=download)
        case DatasetName.CIFAR10:
            return read_cifar(torchvision.datasets.CIFAR10, data_folder(config), download=download)
        case DatasetName.CIFAR100:
            return read_cifar(torchvision.datasets.CIFAR100, data_folder(config), download=download)
        case DatasetName.IMAGEFOLDER:
            raise ConfigurationError("imagefolder is not read into memory")
        case _:
            assert_never(dataset)


def read_digits() -> RawImages:
    """Read scikit-learn's 1,797 real 8×8 digits: 1,438 for training, 359 for testing.

    Every fifth image of each class, in the set's own order, is for testing: the same split in
    every run, whatever its seed. Gray levels 0…16 become 0…255.

    Raises DataError when scikit-learn's file is missing or damaged.

    Source: UCI "Optical Recognition of Handwritten Digits", as in sklearn.datasets.load_digits.
    """
    table = _read_digits_table(_digits_file())
    levels, target = table[:, :-1].double(), table[:, -1]
    images = (levels * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    is_test = torch.zeros(len(target), dtype=torch.bool)
    for label in range(_DIGITS):
        is_test[(target == label).nonzero()[2::5]] = True
    return RawImages(
        images[~is_test],
        target[~is_test],
        images[is_test],
        target[is_test],
        classes=tuple(map(str, range(_DIGITS))),
        split="every fifth image of each class is for testing",
        source="sklearn.datasets.load_digits",
    )


def read_fashion_mnist(folder: Path | None, *, download: bool = False) -> RawImages:
    """Read Fashion-MNIST's four IDX files, gzipped or not, as Debian or torchvision lay them out.

    Without a folder: Debian's place, then the place `download` writes to.

    Raises DataError when a file is missing, damaged, or does not fit the others.
    """
    try:
        files = find_fashion_mnist(folder)
    except DataError:
        if not download:
            raise
        _load(torchvision.datasets.FashionMNIST, folder or download_folder(), download=True)
        files = find_fashion_mnist(folder)
    train_images, test_images = (_read_idx(files[i], 3).unsqueeze(1) for i in (0, 2))
    train_target, test_target = (_read_idx(files[i], 1).long() for i in (1, 3))
    classes = tuple(torchvision.datasets.FashionMNIST.classes)
    for images, target, path in (
        (train_images, train_target, files[0]),
        (test_images, test_target, files[2]),
    ):
        if len(images) != len(target) or len(images) == 0 or int(target.max()) >= len(classes):
            raise DataError(f"{path}: its images and the labels beside it do not belong together")
        if images.shape[2:] != train_images.shape[2:] or images.shape[2] != images.shape[3]:
            raise DataError(f"{path}: images must be square, and of one size for train and test")
    return RawImages(
        train_images,
        train_target,
        test_images,
        test_target,
        classes=classes,
        split="Fashion-MNIST's own (train, t10k)",
        source=str(files[0].parent),
    )


def read_cifar(dataset: Any, folder: Path | None, *, download: bool = False) -> RawImages:
    """Read torchvision's CIFAR10 or CIFAR100 (the class), 32×32 colour, 50,000 + 10,000 images.

    The files are pickles. torchvision compares each with its known MD5 before it unpickles any, so
    only the authors' own pickles are ever executed.

    Raises DataError when the files are missing or are not the known ones, or cannot be downloaded.
    """
    root = folder or download_folder()
    train = _load(dataset, root, train=True, download=download)
    test = _load(dataset, root, train=False)
    images = [
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)
    ]
    return RawImages(
        images[0],
        torch.tensor(train.targets),
        images[1],
        torch.tensor(test.targets),
        classes=tuple(train.classes),
        split="CIFAR's own",
        source=str(root / dataset.base_folder),
    )


def make_synthetic(config: RunConfig) -> RawImages:
    """Make up images that can be learnt: a coarse colour pattern per class, under strong noise.

    `synthetic_images` for training and a quarter as many (at least one per class) for testing, the
    classes in turn; the same images in every run, whatever its seed.

    Raises ConfigurationError when there are fewer images than classes.
    """
    classes, size = config.synthetic_classes, config.image_size or _SYNTHETIC_SIZE
    count = config.synthetic_images
    check_synthetic(config)
    total = count + max(count // 4, classes)
    random = seeded("synthetic", size)
    coarse = torch.randint(80, 176, (classes, 3, 4, 4), generator=random)
    patterns = F.interpolate(coarse.float(), size=size).to(torch.uint8)
    target = torch.arange(total) % classes
    images = torch.empty(total, 3, size, size, dtype=torch.uint8)
    for part, labels in zip(torch.split(images, 1024), torch.split(target, 1024), strict=True):
        noise = torch.randint(-80, 80, part.shape, dtype=torch.int16, generator=random)
        part.copy_(patterns[labels] + noise)
    return RawImages(
        images[:count],
        target[:count],
        images[count:],
        target[count:],
        classes=tuple(f"class {label}" for label in range(classes)),
        split="a quarter as many test images as training images",
        source="made up by pgt-diag",
        made_of=("synthetic", count, classes, size),
    )


def _digits_file() -> Path:
    # Importing scikit-learn takes longer than all else until the first step; nothing of it but
    # this file is needed, and finding the package does not run it.
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return file
    raise DataError(
        "digits: scikit-learn, which holds them in datasets/data/digits.csv.gz, is not installed "
        "whole; python -m pip install --force-reinstall scikit-learn"
    )


def _read_digits_table(path: Path) -> Tensor:
    """Read 64 gray levels and the label of each digit, (1797, 65) int64."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as stream:
            rows = [line.split(",") for line in stream]
        table = np.array(rows, dtype=np.float64).astype(np.int64)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: cannot be read as scikit-learn's digits: {error}") from None
    if table.shape != _DIGITS_SHAPE:
        raise DataError(f"{path}: not scikit-learn's digits: a table of {table.shape}")
    return torch.from_numpy(table)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of bytes, gzipped if its name says so, as a uint8 tensor.

    torchvision's reader takes neither .gz nor a file whose header lies about its size.
    """
    open_file: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as stream:
            magic, *shape = struct.unpack(f">{1 + dimensions}I", stream.read(4 + 4 * dimensions))
            size = math.prod(shape)
            if magic != 0x800 + dimensions or size > _DEFLATE_LIMIT * path.stat().st_size:
                raise DataError(f"{path}: not an IDX file of bytes with {dimensions} dimensions")
            content = stream.read(size + 1)  # past the end, where gzip compares its checksum
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: cannot be read as an IDX file: {error}") from None
    if len(content) != size:
        raise DataError(f"{path}: {size} bytes of data promised, {len(content)} found")
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8).reshape(shape))


def _load(dataset: Any, root: Path, **options: Any) -> Any:
    """Open a torchvision data set; its own errors, and the network's, become one DataError."""
    name = dataset.__name__
    try:
        return dataset(root, **options)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        detail = " ".join(str(error).split())
        if options.get("download"):
            raise DataError(f"{name}: the download into {root} failed: {detail}") from None
        raise no_cifar(name, root) from None
