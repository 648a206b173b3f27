"""ImageNet-style folders: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, decoded batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2 as transforms

from pgt_diag.config import Augment, RunConfig
from pgt_diag.data.base import BadImage, Facts, ImageData, chosen_augmentation, random_number
from pgt_diag.data.images import ImageFiles, readable
from pgt_diag.data.listing import list_splits
from pgt_diag.data.loading import BatchLoader, Sample
from pgt_diag.data.memory import small_padding
from pgt_diag.data.sources import data_folder
from pgt_diag.distributed import Shard
from pgt_diag.errors import ConfigurationError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 224


class FolderData(ImageData):
    """An ImageNet-style folder, decoded by `config.workers` processes (0: by this one).

    Classes and files are those of torchvision's `ImageFolder`, in its order. The test images come
    from `val`, or from `test` where there is no `val`. Images become RGB as Pillow converts them
    (alpha is dropped) and, as in `ImageFolder`, EXIF orientation is ignored. Augmentation small
    crops and flips as for the in-memory data sets, after the resize and centre crop that test
    images get. Normalised by ImageNet's constants.

    With `bad_images` skip, an image that cannot be read is replaced by the next readable one of
    its class and split, cropped and flipped as the image it replaces would have been: where both
    are drawn in one epoch they still differ. Test images too, so that accuracy is always over
    `test_size` images, in which the replacement then counts twice. `bad_images` has them all.
    """

    def __init__(self, config: RunConfig, device: torch.device, shard: Shard) -> None:
        root = data_folder(config)
        if root is None:
            raise ConfigurationError("dataset is imagefolder; name its folder with --data DIR")
        train, test, test_name = list_splits(root)
        size = config.image_size or _IMAGENET_SIZE
        self._images = _Images(
            ImageFiles(train, config.bad_images),
            ImageFiles(test, config.bad_images),
            training_transform(chosen_augmentation(config), size),
            plain_transform(size),
            config.seed,
        )
        self._loader = BatchLoader(
            self._images.load, config.workers, pin_memory=device.type == "cuda"
        )
        self._bad: dict[str, BadImage] = {}
        facts = Facts(
            tuple(readable(name) for name in train.classes),
            size,
            len(train.paths),
            test.target,
            IMAGENET_MEAN,
            IMAGENET_STD,
            split=f"the folders train and {test_name}",
            source=readable(str(root)),
        )
        super().__init__(config, device, facts, shard)

    @property
    def bad_images(self) -> tuple[BadImage, ...]:
        """The unreadable images met so far; see `ImageData.bad_images`."""
        return tuple(self._bad[path] for path in sorted(self._bad))

    def raw_batches(self, epoch: int, start: int = 0) -> Iterator[Sequence[Tensor]]:
        """Yield an epoch's decoded images, uint8, and targets; see `ImageData.raw_batches`."""
        return self._decoded(epoch, self._train_parts(self._epoch_order(epoch), start))

    def prepare(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and target; see `ImageData.prepare`."""
        images, target = parts
        return self._normalise(images), target

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every test image once, class by class; see `ImageData.test_batches`."""
        return (self.prepare(*parts) for parts in self._decoded(None, self._test_parts()))

    def close(self) -> None:
        """End the worker processes; see `ImageData.close`."""
        self._loader.close()

    def _test_originals(self, indices: Tensor) -> Tensor:
        samples = [self._images.load(None, index) for index in indices.tolist()]
        for _, _, bad in samples:
            self._note(bad)
        return torch.stack([image for image, _, _ in samples])

    def _decoded(self, epoch: int | None, parts: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
        requests = ((epoch, part.tolist()) for part in parts)
        for images, target, bad in self._loader.batches(requests):
            self._note(bad)
            yield [each.to(self.device, non_blocking=True) for each in (images, target)]

    def _note(self, bad: Iterable[BadImage]) -> None:
        self._bad |= {image.path: image for image in bad}


@dataclass(frozen=True)
class _Images:
    """Both splits, and what is done to their images."""

    train: ImageFiles
    test: ImageFiles
    augmentation: transforms.Transform
    plain: transforms.Transform
    seed: int

    def load(self, epoch: int | None, index: int) -> Sample:
        """Return image `index` of an epoch (None: of the test set), (3, S, S) uint8."""
        files = self.test if epoch is None else self.train
        image, bad = files.read(index)
        target = files.split.target[index]
        if epoch is None:
            return self.plain(image), target, bad
        # torchvision draws from torch's global generator, which belongs to the training loop.
        with torch.random.fork_rng(devices=[]):
            key = random_number("augment", self.seed, epoch, index)
            torch.default_generator.manual_seed(key)
            return self.augmentation(image), target, bad


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
