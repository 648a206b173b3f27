"""JPEGs decoded, cropped and resized on the training device, in batches."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from PIL import Image
from torch import Tensor

from pgt_diag.data.base import BadImage
from pgt_diag.data.images import Jpeg
from pgt_diag.data.loading import Sample
from pgt_diag.data.streams import SideStream
from pgt_diag.data.views import View
from pgt_diag.errors import ConfigurationError

_CHUNK_BYTES = 1 << 28
"""How much of a batch is decoded at a time: photographs may be a hundred times ImageNet's."""

Decoder = Callable[[list[Tensor]], Sequence[Tensor]]
"""From the bytes of JPEGs, each (N,) uint8 on the CPU, to images (3, H, W) uint8 on the device."""


@dataclass(frozen=True)
class Part:
    """One image of a batch: which it is, and where it stands in the batch's bytes.

    `length` bytes of a JPEG of `size` (width, height) to be seen as `view`; or, without a view,
    finished pixels (3, S, S).
    """

    epoch: int | None
    index: int
    length: int
    size: tuple[int, int] = (0, 0)
    view: View | None = None


@dataclass(frozen=True)
class Encoded:
    """Images on their way to the device that decodes them.

    All in one tensor `content`, (N,) uint8: a tensor each would take a file descriptor each on its
    way from a worker process.
    """

    content: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def jpeg(cls, epoch: int | None, index: int, jpeg: Jpeg, view: View) -> "Encoded":
        """Return a JPEG that is to be seen as `view`."""
        part = Part(epoch, index, len(jpeg.content), jpeg.size, view)
        return cls(jpeg.content, (part,))

    @classmethod
    def pixels(cls, epoch: int | None, index: int, image: Tensor) -> "Encoded":
        """Return an image that is finished, (3, S, S) uint8."""
        return cls(image.flatten(), (Part(epoch, index, image.numel()),))

    @classmethod
    def join(cls, batch: Sequence["Encoded"]) -> "Encoded":
        """Return the images of all of them, in order."""
        parts = tuple(part for one in batch for part in one.parts)
        return cls(torch.cat([one.content for one in batch]), parts)


_Todo = tuple[Tensor, Part, Tensor]
"""Where an image goes, (3, S, S), what is known of it, and its bytes."""


class BatchDecoder:
    """Decodes batches on `device`, on a stream of its own, for one thread after the other.

    `redo(epoch, index)` reads an image in the usual way, (3, S, S) uint8, and is asked for those
    that cannot be decoded here.

    Raises ConfigurationError where no JPEG can be decoded.
    """

    def __init__(
        self, device: torch.device, image_size: int, redo: Callable[[int | None, int], Sample]
    ) -> None:
        self.stream = SideStream(device)
        self._device = device
        self._shape = (3, image_size, image_size)
        self._redo = redo
        self._decode = _decoder(device)
        self._alone = Lock()

    def __call__(self, batch: Sample) -> tuple[Sample, torch.cuda.Event | None]:
        """Return the batch with its images decoded, (B, 3, S, S) uint8, for `stream.hand_over`.

        On a GPU they are channels last. Raises DataError for an image that no way can read.
        """
        encoded, target, bad = batch
        bad = list(bad)
        with self._alone, self.stream.used():
            images = self._empty(len(encoded.parts))
            pieces = encoded.content.split([part.length for part in encoded.parts])
            todo = []
            for place, part, content in zip(images, encoded.parts, pieces, strict=True):
                if part.view is None:
                    place.copy_(content.view(self._shape))
                else:
                    todo.append((place, part, content))
            for chunk in _chunks(todo):
                bad += self._fill(chunk)
            return (images, target, bad), self.stream.mark()

    def _empty(self, count: int) -> Tensor:
        last = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        return torch.empty(
            (count, *self._shape), dtype=torch.uint8, device=self._device, memory_format=last
        )

    def _fill(self, chunk: list[_Todo]) -> list[BadImage]:
        """Decode images into their places; return the bad images that were replaced."""
        bad: list[BadImage] = []
        decoded = self._try([content for _, _, content in chunk])
        for (place, part, _), image in zip(chunk, decoded, strict=True):
            # A decoder that finds another size than Pillow did has read something else.
            if part.view and image is not None and (image.shape[2], image.shape[1]) == part.size:
                place.copy_(part.view.of(image))
            else:
                pixels, _, replaced = self._redo(part.epoch, part.index)
                place.copy_(pixels)
                bad += replaced
        return bad

    def _try(self, contents: list[Tensor]) -> list[Tensor | None]:
        """Decode all of them; None for those that cannot be."""
        # The decoder writes beside this stream, into memory that what is queued here may still
        # have to read: https://github.com/pytorch/vision/pull/9606.
        self.stream.wait()
        try:
            return list(self._decode(contents))
        except RuntimeError:  # does not say whose fault it is
            half = len(contents) // 2
            return self._try(contents[:half]) + self._try(contents[half:]) if half else [None]


def _chunks(todo: list[_Todo]) -> Iterator[list[_Todo]]:
    """Yield images in order, together no more than `_CHUNK_BYTES` when decoded, or one alone."""
    chunk: list[_Todo] = []
    used = 0
    for each in todo:
        size = 3 * math.prod(each[1].size)
        if chunk and used + size > _CHUNK_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(each)
        used += size
    if chunk:
        yield chunk


def _decoder(device: torch.device) -> Decoder:
    """Return a decoder of the packages that are installed, once it has decoded something.

    torchvision's is to go, and torchcodec's takes its place.
    """
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    trial = [torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)]
    reasons = []
    for name, make in (("torchvision", _torchvision), ("torchcodec", _torchcodec)):
        try:
            decode = make(device)
            decode(trial)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {str(error).partition(chr(10))[0]}")
        else:
            return decode
    raise ConfigurationError(
        f"decode is gpu, and nothing decodes JPEGs there ({'; '.join(reasons)}); install "
        "torchcodec 0.16 or later, or use decode cpu"
    )


def _torchvision(device: torch.device) -> Decoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    # From 0.29 on, at every batch; what it says is for us, and done below.
    warnings.filterwarnings("ignore", ".*TorchCodec", DeprecationWarning)

    def decode(contents: list[Tensor]) -> Sequence[Tensor]:
        images: list[Tensor] = decode_jpeg(contents, ImageReadMode.RGB, device)
        return images

    return decode


def _torchcodec(device: torch.device) -> Decoder:
    from torchcodec.decoders import decode_jpeg

    def decode(contents: list[Tensor]) -> Sequence[Tensor]:
        images: list[Tensor] = decode_jpeg(contents, mode="RGB", device=device)
        return images

    return decode
