"""ImageNet-style folders: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, decoded batch by batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pgt_diag.config import Augment, RunConfig
from pgt_diag.data.base import BadImage, Facts, ImageData, chosen_augmentation, random_number
from pgt_diag.data.images import ImageFiles, readable
from pgt_diag.data.listing import list_splits
from pgt_diag.data.loading import BatchLoader, Sample
from pgt_diag.data.sources import data_folder
from pgt_diag.data.views import View, training_view
from pgt_diag.distributed import Shard
from pgt_diag.errors import ConfigurationError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 224


class FolderData(ImageData):
    """An ImageNet-style folder, decoded by `config.workers` processes (0: by this one).

    Classes and files are those of torchvision's `ImageFolder`, in its order. The test images come
    from `val`, or from `test` where there is no `val`. Images become RGB as Pillow converts them
    (alpha is dropped) and, as in `ImageFolder`, EXIF orientation is ignored. They are resized as
    uint8 tensors by torchvision's v2 transforms, antialiased. Augmentation small crops and flips as
    for the in-memory data sets, after the resize and centre crop that test images get. Normalised
    by ImageNet's constants.

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
            chosen_augmentation(config),
            size,
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

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches from batch `start` on; see `ImageData.train_batches`."""
        return self._batches(epoch, self._train_parts(self._epoch_order(epoch), start))

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every test image once, class by class; see `ImageData.test_batches`."""
        return self._batches(None, self._test_parts())

    def close(self) -> None:
        """End the worker processes; see `ImageData.close`."""
        self._loader.close()

    def _test_originals(self, indices: Tensor) -> Tensor:
        samples = [self._images.load(None, index) for index in indices.tolist()]
        for _, _, bad in samples:
            self._note(bad)
        return torch.stack([image for image, _, _ in samples])

    def _batches(
        self, epoch: int | None, parts: Iterable[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        requests = ((epoch, part.tolist()) for part in parts)
        for images, target, bad in self._loader.batches(requests):
            self._note(bad)
            decoded = images.to(self.device, non_blocking=True)
            yield self._normalise(decoded), target.to(self.device, non_blocking=True)

    def _note(self, bad: Iterable[BadImage]) -> None:
        self._bad |= {image.path: image for image in bad}


@dataclass(frozen=True)
class _Images:
    """Both splits, and what is done to their images."""

    train: ImageFiles
    test: ImageFiles
    augment: Augment
    size: int
    seed: int

    def load(self, epoch: int | None, index: int) -> Sample:
        """Return image `index` of an epoch (None: of the test set), (3, size, size) uint8."""
        files = self._files(epoch)
        picture, bad = files.read(index)
        view = self._view(epoch, index, picture.size)
        return view.of_picture(picture), files.split.target[index], bad

    def _files(self, epoch: int | None) -> ImageFiles:
        return self.test if epoch is None else self.train

    def _view(self, epoch: int | None, index: int, image: tuple[int, int]) -> View:
        if epoch is None:
            return View(self.size)
        key = random_number("augment", self.seed, epoch, index)
        return training_view(self.augment, self.size, image, key)
