"""Image files: how one is decoded, and which one stands in for another that cannot be."""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pgt_diag.config import BadImages
from pgt_diag.data.base import BadImage
from pgt_diag.data.listing import Split
from pgt_diag.errors import DataError

# The formats of torchvision's IMG_EXTENSIONS, and GIF. Pillow goes by content, not by name, and
# would hand PostScript to Ghostscript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_NARROWEST = 100
_END_OF_IMAGE = b"\xff\xd9"
_RGB_COMPONENTS = [ord(letter) for letter in "RGB"]
_EXIF = re.compile(rb"\xff\xe1(?=..Exif\0\0)", re.DOTALL)
_UNUSED_SEGMENT = 0xEF
_BITS_PER_SAMPLE = 258
"""The tag of a TIFF image that tells how many of 16 bits are used."""
_RANGELESS = {"I": "32-bit or signed integers", "F": "floating-point numbers"}

# What Pillow warns of is read all the same, or is an error a moment later; the lines between those
# of a run would name no file.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImageError(DataError):
    """An image file that cannot be decoded; `reason` says why without naming it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f'cannot read image {path!r}: {reason}; mend or remove it, or use `bad_images="skip"`'
        )
        self.reason = reason


@dataclass(frozen=True)
class Jpeg:
    """An image still to be decoded: its file's bytes (N,) uint8, and (width, height) in pixels.

    They say nothing of a camera's orientation.
    """

    content: Tensor
    size: tuple[int, int]


class ImageFiles:
    """The images of one split, read one at a time; every worker process has a copy.

    With `bad_images` skip, an image that cannot be read is replaced by the next readable one of
    its class, in listing order and after the last the first. What replaces it depends on the files
    alone, so it is the same in every epoch, in every process and after a resume.
    """

    def __init__(self, split: Split, bad_images: BadImages) -> None:
        self.split = split
        self._skip = bad_images is BadImages.SKIP
        self._reasons: dict[int, str] = {}

    def read(self, index: int) -> tuple[Image.Image, tuple[BadImage, ...]]:
        """Return an RGB image for `index`, and the bad images passed over to find it.

        Raises DataError, naming the file, when it cannot be read; with skip only when nothing in
        its class can, naming the folder.
        """
        image, bad = self._read(index, encoded=False)
        assert isinstance(image, Image.Image)
        return image, bad

    def read_encoded(self, index: int) -> tuple[Image.Image | Jpeg, tuple[BadImage, ...]]:
        """Do as `read`, but leave to the caller to decode what `read_jpeg` returns.

        Damage that only decoding shows is then met by the caller, who asks `read` about it.
        """
        return self._read(index, encoded=True)

    def _read(
        self, index: int, *, encoded: bool
    ) -> tuple[Image.Image | Jpeg, tuple[BadImage, ...]]:
        bad: list[int] = []
        for candidate in self._class_from(index):
            image = self._try(candidate, encoded=encoded)
            if image is not None:
                used = self._shown(candidate)
                return image, tuple(BadImage(self._shown(i), used, self._reasons[i]) for i in bad)
            bad.append(candidate)
        folder = self.split.folder / self.split.classes[int(self.split.target[index])]
        raise DataError(
            f"none of the {len(bad)} images in class folder {str(folder)!r} can be read "
            f"({Path(self.split.paths[index]).name!r}: {self._reasons[index]}); "
            "restore the folder or remove the class"
        )

    def _try(self, index: int, *, encoded: bool) -> Image.Image | Jpeg | None:
        if index in self._reasons:
            return None
        path = self.split.paths[index]
        try:
            return (read_jpeg(path) if encoded else None) or decode(path)
        except UnreadableImageError as error:
            if not self._skip:
                raise
            self._reasons[index] = error.reason
            return None

    def _class_from(self, index: int) -> Iterator[int]:
        """Yield `index`, those after it in its class, then those before it."""
        yield index
        target = self.split.target
        first = int(torch.searchsorted(target, target[index]))
        end = int(torch.searchsorted(target, target[index], right=True))
        yield from range(index + 1, end)
        yield from range(first, index)

    def _shown(self, index: int) -> str:
        return readable(Path(self.split.paths[index]).relative_to(self.split.root).as_posix())


def decode(path: str) -> Image.Image:
    """Decode an image file to RGB, orientation as stored.

    Raises UnreadableImageError, naming the file, when it is no plain file or no intact image.
    """
    try:
        return _decode(path)
    except UnidentifiedImageError:
        detail = "not an image of a known format"
    except OSError as error:
        detail = error.strerror or str(error)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        detail = str(error) or type(error).__name__
    raise UnreadableImageError(path, " ".join(detail.split()))


def read_jpeg(path: str) -> Jpeg | None:
    """Return a JPEG that other decoders than Pillow's read as it does, and to its end.

    None for every other file, which `decode` then reads, or says what is wrong with: another
    format, CMYK, colours stored as RGB, several images, the end missing.
    """
    try:
        with _open_plain(path) as file, Image.open(file, formats=("JPEG",)) as image:
            _check_shape(image)
            if not _is_common(image) or os.fstat(file.fileno()).st_size > _most_bytes(image):
                return None
            file.seek(0)
            content = bytearray(file.read())
            size = image.size
    except Exception:  # whatever it is, `decode` meets it again and names it
        return None
    if not content.rstrip(b"\0").endswith(_END_OF_IMAGE):
        return None
    for match in _EXIF.finditer(content):
        content[match.start() + 1] = _UNUSED_SEGMENT  # some decoders would turn the image
    return Jpeg(torch.frombuffer(content, dtype=torch.uint8), size)


def _is_common(image: Image.Image) -> bool:
    """Whether a JPEG, its header read, is a single gray or YCbCr image."""
    components = [component for component, *_ in getattr(image, "layer", ())]
    return (
        image.format == "JPEG"
        and image.mode in ("L", "RGB")
        and components != _RGB_COMPONENTS
        and image.info.get("adobe_transform") != 0
    )


def _most_bytes(image: Image.Image) -> int:
    """Return more bytes than a file of so many pixels has: memory is not for what it may hide."""
    return 3 * image.width * image.height + (1 << 20)


def _decode(path: str) -> Image.Image:
    with _open_plain(path) as file, Image.open(file, formats=_FORMATS) as image:
        _check_shape(image)
        white = _white(image)
        image.load()
        if white is not None:
            return _in_8_bits(image, white).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


def _white(image: Image.Image) -> int | None:
    """Return which value is white in an image of 16 bits a pixel, gray; None for other images.

    Pillow cuts such values off at 255 when it converts them, without a word.

    Raises ValueError for pixels whose range nothing tells.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return int(2 ** bits[0]) - 1
    # The 16 bits of some formats become 32 without any change of their values.
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535
    if image.mode in _RANGELESS:
        raise ValueError(
            f"its pixels are {_RANGELESS[image.mode]} (mode {image.mode}), and nothing says which "
            "of them is white; save it with 8 or 16 bits"
        )
    return None


def _in_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Return a gray image of values 0 to `white` with 0 to 255, rounded: 16 bits times 1/257."""
    values = np.asarray(image).astype(np.int32)
    return Image.fromarray(((510 * values + white) // (2 * white)).astype(np.uint8))


def _open_plain(path: str) -> io.BufferedReader:
    if not stat.S_ISREG(Path(path).stat().st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a plain file")
    return Path(path).open("rb")


def _check_shape(image: Image.Image) -> None:
    if max(image.size) > _NARROWEST * min(image.size):
        # Its shorter side is resized to a fixed length: the longer one would fill the memory.
        raise ValueError(f"{image.width}×{image.height} pixels are too narrow")


def readable(name: str) -> str:
    """Return a file name with undecodable bytes replaced: JSON and HTML files cannot hold them."""
    return os.fsencode(name).decode(errors="replace")
