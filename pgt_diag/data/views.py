"""Which part of an image is seen: drawn from its size alone, so that any decoder can cut it out."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from pgt_diag.config import Augment
from pgt_diag.data.memory import small_padding

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class View:
    """A part of a stored image as `size` × `size` pixels: a box of it, or its resized centre.

    `box` is (top, left, height, width) in pixels of the image. Without one, the image is resized
    and its centre cut out in the proportion 256 to 224, then moved by `shift` rows and columns
    over a black border. `flip` mirrors left and right.
    """

    size: int
    box: tuple[int, int, int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    flip: bool = False

    def of(self, image: Tensor) -> Tensor:
        """Return this view, (3, size, size) uint8, of an image (3, H, W) uint8, on its device."""
        square = [self.size, self.size]
        if self.box is not None:
            image = transforms.resized_crop(image, *self.box, square)
        else:
            image = transforms.resize(image, [round(self.size * 256 / 224)])
            image = transforms.center_crop(image, square)
            if any(self.shift):
                image = transforms.crop(image, *self.shift, *square)
        return transforms.horizontal_flip(image) if self.flip else image

    def of_picture(self, picture: Image.Image) -> Tensor:
        """Return this view, (3, size, size) uint8, of a decoded RGB image."""
        if self.box is None:
            return self.of(_as_tensor(picture))
        top, left, height, width = self.box
        # Only the box: what is left out is not turned into a tensor.
        part = picture.crop((left, top, left + width, top + height))
        return dataclasses.replace(self, box=(0, 0, height, width)).of(_as_tensor(part))


def training_view(augment: Augment, size: int, image: tuple[int, int], key: int) -> View:
    """Draw the training view of an image of (width, height) pixels from 64 random bits, `key`.

    imagenet: a box of 0.08 to 1 of the area at a ratio from 3/4 to 4/3; small: the centre shifted
    by up to an eighth; both mirrored half of the time. The draws are those of torchvision's
    RandomResizedCrop, RandomCrop and RandomHorizontalFlip after `torch.manual_seed(key)`, without
    touching torch's global generator, which belongs to the training loop.

    Source: the paper's code, which has no colour jitter.
    """
    if augment is Augment.NONE:
        return View(size)
    random = torch.Generator().manual_seed(key)
    if augment is Augment.SMALL:
        padding = small_padding(size)
        top, left = (_below(2 * padding + 1, random) - padding for _ in range(2))
        return View(size, shift=(top, left), flip=_half(random))
    return View(size, box=_random_box(*image, random), flip=_half(random))


def _random_box(width: int, height: int, random: torch.Generator) -> tuple[int, int, int, int]:
    low, high = map(math.log, _RATIO)
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*_AREA, generator=random).item()
        ratio = torch.empty(1).uniform_(low, high, generator=random).exp().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = _below(height - h + 1, random)
            return top, _below(width - w + 1, random), h, w
    # Too narrow: as much of its middle as the ratios allow.
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _below(end: int, random: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=random))


def _half(random: torch.Generator) -> bool:
    return bool(torch.rand(1, generator=random) < 0.5)


def _as_tensor(picture: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) uint8, channels last as Pillow stores it."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
