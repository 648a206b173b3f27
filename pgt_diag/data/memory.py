"""Data sets that fit in memory: uint8 on the training device, augmented there in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from pgt_diag.config import Augment, RunConfig
from pgt_diag.data.base import Facts, ImageData, chosen_augmentation, seeded
from pgt_diag.data.contents import Contents
from pgt_diag.distributed import Shard
from pgt_diag.errors import ConfigurationError

_CHUNK = 4096


@dataclass(frozen=True)
class RawImages:
    """A data set as read: images (N, C, S, S) uint8 with C 1 or 3, targets (N,) int64.

    Of images that are made up, `made_of` holds the plain values that decide them.
    """

    train_images: Tensor
    train_target: Tensor
    test_images: Tensor
    test_target: Tensor
    classes: tuple[str, ...]
    split: str
    source: str
    made_of: tuple[int | str, ...] = ()

    def contents(self) -> tuple[Contents, Contents]:
        """Return what the training and the test images are."""
        if self.made_of:
            counts = (len(self.train_images), len(self.test_images))
            train, test = (Contents.of_parameters(count, *self.made_of) for count in counts)
            return train, test
        return (
            Contents.of_tensors(self.train_images, self.train_target),
            Contents.of_tensors(self.test_images, self.test_target),
        )


class InMemoryData(ImageData):
    """A whole data set on the training device as uint8, resized once, augmented per batch."""

    def __init__(
        self, config: RunConfig, device: torch.device, raw: RawImages, shard: Shard
    ) -> None:
        if chosen_augmentation(config) is Augment.IMAGENET:
            raise ConfigurationError(
                f"augment is imagenet and dataset is {config.dataset}; use small or none"
            )
        size = config.image_size or raw.train_images.shape[-1]
        train = resize(raw.train_images, size)
        mean, std = channel_statistics(train)
        facts = Facts(
            raw.classes, size, len(train), raw.test_target, mean, std, raw.split, raw.source
        )
        super().__init__(config, device, facts, shard)
        self._raw_contents = raw.contents()  # of what is resized, and is not kept as it was
        self._train = train.to(device)
        self._train_target = raw.train_target.to(device)
        self._test = resize(raw.test_images, size).to(device)
        self._test_target = raw.test_target.to(device)

    def raw_batches(self, epoch: int, start: int = 0) -> Iterator[Sequence[Tensor]]:
        """Yield an epoch's images by their indices, with their crops and flips where there are any.

        See `ImageData.raw_batches`.
        """
        order = self._epoch_order(epoch)
        columns = [order]
        if self.augment is Augment.SMALL:
            columns += [drawn[order] for drawn in draw_crops_and_flips(self, epoch)]
        parts = [self._train_parts(column.to(self.device), start) for column in columns]
        return iter(list(zip(*parts, strict=True)))

    def prepare(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and target; see `ImageData.prepare`."""
        chosen, *crop = parts
        images = self._train[chosen]
        if crop:
            images = crop_and_flip(images, *crop)
        return self._normalise(images), self._train_target[chosen]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every test image once, in the data set's own order."""
        for part in self._test_parts():
            chosen = part.to(self.device)
            yield self._normalise(self._test[chosen]), self._test_target[chosen]

    def _contents(self) -> tuple[Contents, Contents]:
        return self._raw_contents

    def _test_originals(self, indices: Tensor) -> Tensor:
        return self._test[indices.to(self.device)].expand(-1, 3, -1, -1).cpu()


def draw_crops_and_flips(data: ImageData, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw one epoch's augmentation, on the CPU: shifts (train_size, 2) int64, down and right from
    the upper left corner of the image with its border, and whether to flip, (train_size,) bool.

    Every image of the epoch has its own draw from the start, so that a draw depends neither on
    the batch nor on what came before.
    """
    random = seeded("augment", data.seed, epoch)
    choices = 2 * small_padding(data.image_size) + 1
    shifts = torch.randint(choices, (data.train_size, 2), generator=random)
    return shifts, torch.randint(2, (data.train_size,), generator=random).bool()


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop images (B, C, S, S) uint8 out of a black border, and flip some; see the draws above.

    Shifts reach an eighth of the image: 4 pixels of 32.

    Source: He et al. 2016, arXiv 1512.03385, Section 4.2.
    """
    count, channels, size = images.shape[:3]
    pixels = torch.arange(size, device=images.device)
    columns = torch.where(flips[:, None], pixels.flip(0), pixels) + shifts[:, 1:]
    rows = pixels + shifts[:, :1]
    padded = F.pad(images, (small_padding(size),) * 4)
    return padded[
        torch.arange(count, device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def small_padding(image_size: int) -> int:
    """Return the black border of the small augmentation in pixels: 4 at 32, in proportion."""
    return max(1, round(image_size / 8))


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images (N, C, S, S) to (N, C, size, size), bilinear with antialiasing."""
    if images.shape[-1] == size:
        return images
    # In pieces: torchvision computes in float32, four times the memory of the data set.
    parts = [transforms.resize(part, [size, size]) for part in torch.split(images, _CHUNK)]
    return torch.cat(parts)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, for pixels in [0, 1], always 3 channels.

    Integer sums, so the result does not depend on the number of threads. A constant channel counts
    as varying by one gray level, so that normalising it divides by something.
    """
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for part in torch.split(images, _CHUNK):
        values = part.int()
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=1).sqrt()
    channels = 3 // images.shape[1]
    return (mean / 255).tolist() * channels, (std / 255).tolist() * channels
