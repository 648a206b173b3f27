"""What every data set offers the training loop, and the randomness that makes runs repeatable."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pgt_diag.config import Augment, DatasetName, RunConfig
from pgt_diag.data.contents import Contents
from pgt_diag.distributed import Shard
from pgt_diag.errors import ConfigurationError
from pgt_diag.preflight import check_batch


def random_number(*key: str | int) -> int:
    """Return 64 bits that depend on every part of `key` and on nothing else.

    Augmentation keyed on (seed, epoch, image) is the same for any number of worker processes and
    after a resume in the middle of an epoch.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())


def seeded(*key: str | int) -> torch.Generator:
    """Return a CPU generator started from `random_number(*key)`."""
    return torch.Generator().manual_seed(random_number(*key))


def chosen_augmentation(config: RunConfig) -> Augment:
    """Resolve `auto`: none for digits and synthetic, imagenet for folders, else small."""
    if config.augment is not Augment.AUTO:
        return config.augment
    if config.dataset in (DatasetName.DIGITS, DatasetName.SYNTHETIC):
        return Augment.NONE
    return Augment.IMAGENET if config.dataset is DatasetName.IMAGEFOLDER else Augment.SMALL


@dataclass(frozen=True)
class Facts:
    """What is known of a data set before training.

    `test_target` is (test_size,) int64 on the CPU; `mean` and `std` are per channel (3 values)
    for pixel values in [0, 1]; `split` and `source` are sentences for people, and `notes` what
    they should know before they train.
    """

    classes: tuple[str, ...]
    image_size: int
    train_size: int
    test_target: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    split: str
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, and the one used in its place.

    Both as paths within the data folder, `train/CLASS/NAME`; `reason` is a short text.
    """

    path: str
    replaced_by: str
    reason: str


class ImageData(ABC):
    """Training and test images of one data set, in batches.

    Batches are pairs on the training device: images (B, 3, S, S) float32, normalised by the data
    set's mean and standard deviation, and target (B,) int64. With a `shard` they are one process's
    share of every training batch, and of the test images.
    """

    def __init__(self, config: RunConfig, device: torch.device, facts: Facts, shard: Shard) -> None:
        self.name = config.dataset.value
        self.classes = facts.classes
        self.image_size = facts.image_size
        self.train_size = facts.train_size
        self.test_size = len(facts.test_target)
        self.batch_size = config.batch_size
        self.augment = chosen_augmentation(config)
        self.device = device
        self.seed = config.seed
        self._facts = facts
        self._shard = shard
        self._mean = _per_channel(facts.mean, device)
        self._std = _per_channel(facts.std, device)
        check_batch(config, self.train_size)
        if self.test_size < shard.world:
            raise ConfigurationError(
                f"{self.name} has only {self.test_size} test images for {shard.world} processes"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the data before training, a line each."""
        return self._facts.notes

    @cached_property
    def contents(self) -> tuple[Contents, Contents]:
        """What the training and the test images are; it takes seconds for a folder of millions."""
        return self._contents()

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in an epoch; the incomplete last one is dropped, as in the paper's code."""
        return self.train_size // self.batch_size

    @property
    def bad_images(self) -> tuple[BadImage, ...]:
        """The unreadable images met so far in this process, by path; see `RunConfig.bad_images`.

        Training, test and sample images alike, from worker processes too. After whole epochs it
        is the same for any number of workers.
        """
        return ()

    def close(self) -> None:  # noqa: B027 (most data sets have nothing to end)
        """End worker processes, if there are any. Batches asked for later start new ones."""

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches from batch `start` on; skipped batches are not decoded.

        The order depends only on (seed, epoch); an image's augmentation only on (seed, epoch,
        image). Raises DataError, naming the file, for an image that cannot be read; with
        `bad_images` skip only when no image of its class can, naming the class folder.
        """
        return (self.prepare(*parts) for parts in self.raw_batches(epoch, start))

    @abstractmethod
    def raw_batches(self, epoch: int, start: int = 0) -> Iterator[Sequence[Tensor]]:
        """Yield what `prepare` makes the batches of `train_batches` from: tensors on the device.

        All batches of a run have the same shapes.
        """

    @abstractmethod
    def prepare(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the target of a raw batch.

        It depends on `parts` alone and never waits for the device: it can be captured as a part of
        the training step.
        """

    @abstractmethod
    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every test image once, in a fixed order; the last batch may be smaller.

        Raises DataError as `train_batches` does.
        """

    def sample_images(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same `count` test images in every run, of as many classes as there are.

        On the CPU: images (count, 3, S, S) float32 normalised, originals (count, 3, S, S) uint8
        for display, target (count,) int64. Raises ConfigurationError when the test set is smaller
        than `count`, and DataError as `train_batches` does.
        """
        if count > self.test_size:
            raise ConfigurationError(
                f"{count} sample images asked for, but {self.name} has {self.test_size} test images"
            )
        chosen = _one_class_after_another(self._facts.test_target)[:count]
        originals = self._test_originals(chosen)
        images = self._normalise(originals.to(self.device)).cpu()
        return images, originals, self._facts.test_target[chosen]

    def description(self) -> dict[str, Any]:
        """Return what a run directory should say of its data, as plain JSON values."""
        train, test = self.contents
        return {
            "name": self.name,
            "classes": list(self.classes),
            "image_size": self.image_size,
            "train_images": self.train_size,
            "test_images": self.test_size,
            "train_digest": train.digest,
            "test_digest": test.digest,
            "mean": list(self._facts.mean),
            "std": list(self._facts.std),
            "augment": self.augment.value,
            "split": self._facts.split,
            "source": self._facts.source,
        }

    @abstractmethod
    def _contents(self) -> tuple[Contents, Contents]:
        """Return what `contents` keeps."""

    @abstractmethod
    def _test_originals(self, indices: Tensor) -> Tensor:
        """Return test images (B, 3, S, S) uint8 on the CPU for `indices` (B,) int64."""

    def _epoch_order(self, epoch: int) -> Tensor:
        """Return the image indices of an epoch, (batches_per_epoch · batch_size,) int64."""
        order = torch.randperm(self.train_size, generator=seeded("order", self.seed, epoch))
        return order[: self.batches_per_epoch * self.batch_size]

    def _train_parts(self, order: Tensor, start: int) -> list[Tensor]:
        """Return the share of an epoch's `order` that is this process's, batch by batch."""
        batches = torch.split(order, self.batch_size)
        return [self._shard.of(batch) for batch in batches[start:]]

    def _test_parts(self) -> list[Tensor]:
        """Return the test images' indices in batches; each image is one process's.

        All processes have equally many batches, and none is empty.
        """
        indices = torch.arange(self.test_size)
        if self._shard.world == 1:
            return list(torch.split(indices, self.batch_size))
        count = max(1, self.test_size // self.batch_size)
        return list(torch.tensor_split(self._shard.of(indices), count))

    def _normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 (B, 3, S, S) or gray (B, 1, S, S) into normalised float32 (B, 3, S, S)."""
        return (images - self._mean).div_(self._std)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Return values for [0, 1] pixels as (3, 1, 1) float32 for pixels in 0…255."""
    return torch.tensor([255 * value for value in values], device=device).view(3, 1, 1)


def _one_class_after_another(target: Tensor) -> Tensor:
    """Return indices: the first image of each class, then the second of each, and so on."""
    by_class = torch.argsort(target, stable=True)
    first = torch.searchsorted(target[by_class], target)
    place = torch.empty_like(by_class)
    place[by_class] = torch.arange(len(target))
    return torch.argsort((place - first) * (int(target.max()) + 1) + target, stable=True)
