"""ImageNet-style folders: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, decoded batch by batch."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgt_diag.config import Augment, Decode, RunConfig
from pgt_diag.data.base import BadImage, Facts, ImageData, chosen_augmentation, random_number
from pgt_diag.data.contents import Contents
from pgt_diag.data.decoding import BatchDecoder, Encoded
from pgt_diag.data.images import ImageFiles, Jpeg, readable
from pgt_diag.data.listing import Split, list_splits
from pgt_diag.data.loading import BatchLoader, Request, Sample
from pgt_diag.data.streams import SideStream, ahead
from pgt_diag.data.views import View, training_view
from pgt_diag.distributed import Shard
from pgt_diag.preflight import check_folder_use, data_folder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_SIZE = 224


class FolderData(ImageData):
    """An ImageNet-style folder, read by `config.workers` processes (0: by this one).

    Those also decode, crop and resize its images. With `decode` gpu, `device` does that instead,
    batch by batch, for JPEGs that are not out of the ordinary: the same parts of the same images,
    but by other code, so that pixels differ slightly. Sample images are the same either way.

    Classes and files are those of torchvision's `ImageFolder`, in its order, but for hidden ones:
    `.ipynb_checkpoints` is no class, and what macOS adds to archives no image. The test images come
    from `val`, or from `test` where there is no `val`. Images become RGB as Pillow converts them
    (alpha is dropped), but gray of 16 bits is scaled to 8, and as in `ImageFolder`, EXIF
    orientation is ignored. They are resized as uint8 tensors by torchvision's v2 transforms,
    antialiased. Augmentation small crops and flips as for the in-memory data sets, after the resize
    and centre crop that test images get. Normalised by ImageNet's constants.

    With `bad_images` skip, an image that cannot be read is replaced by the next readable one of
    its class and split, cropped and flipped as the image it replaces would have been: where both
    are drawn in one epoch they still differ. Test images too, so that accuracy is always over
    `test_size` images, in which the replacement then counts twice. `bad_images` has them all.
    """

    def __init__(self, config: RunConfig, device: torch.device, shard: Shard) -> None:
        check_folder_use(config)
        root = data_folder(config)
        assert root is not None
        train, test, test_name = list_splits(root)
        size = config.image_size or _IMAGENET_SIZE
        self._images = _Images(
            ImageFiles(train, config.bad_images),
            ImageFiles(test, config.bad_images),
            chosen_augmentation(config),
            size,
            config.seed,
        )
        self._decode = config.decode
        pin_memory = device.type == "cuda"
        if self._decode is Decode.GPU:
            self._decoder = BatchDecoder(device, size, self._images.load)
            self._loader = BatchLoader(
                self._images.load_encoded, config.workers, join=Encoded.join, pin_memory=pin_memory
            )
        else:
            self._upload = SideStream(device)
            self._loader = BatchLoader(self._images.load, config.workers, pin_memory=pin_memory)
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
            notes=_notes(train, test),
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

    def description(self) -> dict[str, Any]:
        """Return what a run directory should say of its data; see `ImageData.description`."""
        return {**super().description(), "decode": self._decode.value}

    def close(self) -> None:
        """End the worker processes; see `ImageData.close`."""
        self._loader.close()

    def _contents(self) -> tuple[Contents, Contents]:
        train, test = (
            Contents.of_files(_files(files.split))
            for files in (self._images.train, self._images.test)
        )
        return train, test

    def _test_originals(self, indices: Tensor) -> Tensor:
        samples = [self._images.load(None, index) for index in indices.tolist()]
        for _, _, bad in samples:
            self._note(bad)
        return torch.stack([image for image, _, _ in samples])

    def _decoded(self, epoch: int | None, parts: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
        requests = ((epoch, part.tolist()) for part in parts)
        for images, target, bad in self._on_device(requests):
            self._note(bad)
            yield images, target.to(self.device, non_blocking=True)

    def _on_device(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield batches whose images, (B, 3, S, S) uint8, are on the device."""
        if self._decode is Decode.GPU:
            for (images, target, bad), made in ahead(self._decoder, self._loader.batches(requests)):
                yield self._decoder.stream.hand_over(images, made), target, bad
            return
        for images, target, bad in self._loader.batches(requests):
            # Beside the iteration that the GPU is still at. As bytes: what the network is given
            # has its channels last, and float32 would take four times as long to turn round.
            with self._upload.used():
                moved = images.to(self.device, non_blocking=True)
                if moved.is_cuda:
                    moved = moved.contiguous(memory_format=torch.channels_last)
            yield self._upload.hand_over(moved, self._upload.mark()), target, bad

    def _note(self, bad: Iterable[BadImage]) -> None:
        self._bad |= {image.path: image for image in bad}


def _files(split: Split) -> Iterator[tuple[str, str, int]]:
    """Yield every image's class, its path within the split, and its size in bytes."""
    start = len(str(split.folder)) + 1
    for path, label in zip(split.paths, split.target.tolist(), strict=True):
        try:
            size = os.stat(path).st_size  # noqa: PTH116 (a million times)
        except OSError:  # gone since it was listed; told when its turn comes
            size = -1
        yield readable(split.classes[label]), readable(path[start:].replace(os.sep, "/")), size


_FEW_CLASSES = 10
_FEW_PATHS = 3


def _notes(train: Split, test: Split) -> tuple[str, ...]:
    """Say how many classes and images of each there are, and what is left out."""
    notes = [_class_counts(train, test)]
    hidden = sorted(map(readable, train.left_out.hidden + test.left_out.hidden))
    if hidden:
        more = f" and {len(hidden) - _FEW_PATHS:,} more" if len(hidden) > _FEW_PATHS else ""
        notes.append(f"skipped, because hidden: {', '.join(hidden[:_FEW_PATHS])}{more}")
    for split in (train, test):
        unread = split.left_out.unread_images
        if unread:
            count, kinds = sum(unread.values()), ", ".join(sorted(unread))
            files = "1 file in {} is" if count == 1 else f"{count:,} files in {{}} are"
            notes.append(f"{files.format(split.folder.name)} not read, being {kinds}")
    return tuple(notes)


def _class_counts(train: Split, test: Split) -> str:
    if len(train.classes) <= _FEW_CLASSES:
        each = ", ".join(
            f"{readable(name)} {of_train:,} + {of_test:,}"
            for name, of_train, of_test in zip(
                train.classes, train.counts, test.counts, strict=True
            )
        )
        return f"{len(train.classes)} classes, training + test images: {each}"
    of_train, of_test = (
        f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
        for counts in (train.counts, test.counts)
    )
    return f"{len(train.classes):,} classes of {of_train} training and {of_test} test images each"


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

    def load_encoded(self, epoch: int | None, index: int) -> Sample:
        """Do as `load`, but return `Encoded`: not decoded where a GPU can do it as well."""
        files = self._files(epoch)
        image, bad = files.read_encoded(index)
        view = self._view(epoch, index, image.size)
        if isinstance(image, Jpeg):
            encoded = Encoded.jpeg(epoch, index, image, view)
        else:
            encoded = Encoded.pixels(epoch, index, view.of_picture(image))
        return encoded, files.split.target[index], bad

    def _files(self, epoch: int | None) -> ImageFiles:
        return self.test if epoch is None else self.train

    def _view(self, epoch: int | None, index: int, image: tuple[int, int]) -> View:
        if epoch is None:
            return View(self.size)
        key = random_number("augment", self.seed, epoch, index)
        return training_view(self.augment, self.size, image, key)
