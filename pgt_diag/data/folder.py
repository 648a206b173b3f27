"""ImageNet-style folders: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, decoded batch by batch."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as transforms

from pgt_diag.config import Augment, RunConfig
from pgt_diag.data.base import Facts, ImageData, chosen_augmentation, random_number
from pgt_diag.data.listing import Split, list_splits
from pgt_diag.data.memory import small_padding
from pgt_diag.data.sources import data_folder
from pgt_diag.errors import ConfigurationError, DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 224
# The formats of torchvision's IMG_EXTENSIONS, and GIF. Pillow goes by content, not by name, and
# would hand PostScript to Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_NARROWEST = 100


class FolderData(ImageData):
    """An ImageNet-style folder, decoded by `config.workers` processes (0: by this one).

    Classes and files are those of torchvision's `ImageFolder`, in its order. The test images come
    from `val`, or from `test` where there is no `val`. Images become RGB as Pillow converts them
    (alpha is dropped) and, as in `ImageFolder`, EXIF orientation is ignored. Augmentation small
    crops and flips as for the in-memory data sets, after the resize and centre crop that test
    images get. Normalised by ImageNet's constants.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        root = data_folder(config)
        if root is None:
            raise ConfigurationError("dataset is imagefolder; name its folder with --data DIR")
        self._train, self._test, test_name = list_splits(root)
        self._workers = config.workers
        size = config.image_size or _IMAGENET_SIZE
        self._augmentation = training_transform(chosen_augmentation(config), size)
        self._plain = plain_transform(size)
        facts = Facts(
            tuple(_readable(name) for name in self._train.classes),
            size,
            len(self._train.paths),
            self._test.target,
            IMAGENET_MEAN,
            IMAGENET_STD,
            split=f"the folders train and {test_name}",
            source=_readable(str(root)),
        )
        super().__init__(config, device, facts)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches from batch `start` on; see `ImageData.train_batches`."""
        images = _Decoded(self._train, self._augmentation, ("augment", self.seed, epoch))
        yield from self._batches(images, self._epoch_order(epoch)[start * self.batch_size :])

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every test image once, class by class; see `ImageData.test_batches`."""
        images = _Decoded(self._test, self._plain, ("test",))
        yield from self._batches(images, torch.arange(self.test_size))

    def _test_originals(self, indices: Tensor) -> Tensor:
        paths = [self._test.paths[index] for index in indices.tolist()]
        return torch.stack([self._plain(decode(path)) for path in paths])

    def _batches(self, images: "_Decoded", order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=(p.tolist() for p in torch.split(order, self.batch_size) if len(p)),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one, the loader draws from the global generator
        )
        for batch in _survive_dead_workers(iter(loader)):
            if isinstance(batch, _Unreadable):
                raise DataError(batch.reason)
            decoded, target = (part.to(self.device, non_blocking=True) for part in batch)
            yield self._normalise(decoded), target


def training_transform(augment: Augment, size: int) -> transforms.Transform:
    """Return the training transform from a PIL image to (3, size, size) uint8.

    Source: the paper's code, as FACTS has it: crops of 0.08 to 1 of the area at ratios from 3/4 to
    4/3, and horizontal flips; no colour jitter.
    """
    if augment is Augment.NONE:
        return plain_transform(size)
    if augment is Augment.SMALL:
        crop = [plain_transform(size), transforms.RandomCrop(size, padding=small_padding(size))]
    else:
        crop = [
            transforms.RandomResizedCrop(size, scale=(0.08, 1), ratio=(3 / 4, 4 / 3)),
            transforms.PILToTensor(),
        ]
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip()])


def plain_transform(size: int) -> transforms.Transform:
    """Return the test transform from a PIL image to (3, size, size) uint8.

    Resize and centre crop in the proportion 256 to 224.
    """
    resized = transforms.Resize(round(size * 256 / 224))
    return transforms.Compose([resized, transforms.CenterCrop(size), transforms.PILToTensor()])


def decode(path: str) -> Image.Image:
    """Decode an image file to RGB, orientation as stored.

    Raises DataError, naming the file, when it is no plain file or no intact image.
    """
    try:
        return _decode(path)
    except UnidentifiedImageError:
        detail = "not an image of a known format"
    except OSError as error:
        detail = error.strerror or str(error)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        detail = str(error) or type(error).__name__
    raise DataError(f"cannot read image {path!r}: {' '.join(detail.split())}")


def _decode(path: str) -> Image.Image:
    if not stat.S_ISREG(Path(path).stat().st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a plain file")
    with Image.open(path, formats=_FORMATS) as image:
        if max(image.size) > _NARROWEST * min(image.size):
            # Its shorter side is resized to a fixed length: the longer one would fill the memory.
            raise ValueError(f"{image.width}×{image.height} pixels are too narrow")
        return image.convert("RGB")


def _readable(name: str) -> str:
    """Return a file name with undecodable bytes replaced: JSON and HTML files cannot hold them."""
    return os.fsencode(name).decode(errors="replace")


@dataclass(frozen=True)
class _Unreadable:
    """A DataError on its way out of a worker, which would bury the exception in a traceback."""

    reason: str


@dataclass(frozen=True)
class _Decoded(Dataset[Any]):
    """The images of one split in one epoch; every worker process has a copy."""

    split: Split
    transform: transforms.Transform
    key: tuple[str | int, ...]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | _Unreadable:
        try:
            image = decode(self.split.paths[index])
        except DataError as error:
            return _Unreadable(str(error))
        # torchvision draws from torch's global generator, which belongs to the training loop.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_number(*self.key, index))
            return self.transform(image), self.split.target[index]


def _collate(samples: list[Any]) -> tuple[Tensor, Tensor] | _Unreadable:
    for sample in samples:
        if isinstance(sample, _Unreadable):
            return sample
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(targets)


def _survive_dead_workers(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass batches on; the loader's RuntimeError for a killed worker becomes a DataError."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            detail = " ".join(str(error).split())
            raise DataError(f"an image loading process died (out of memory?): {detail}") from None
        yield batch
