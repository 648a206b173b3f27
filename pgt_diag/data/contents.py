"""What a split of a data set holds, in few bytes: to find it changed later, and to say how."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor

_MOST_FILES = 100_000
"""Of which a checkpoint keeps the names: a megabyte. Of more it keeps what each class holds."""
_MOST_BYTES = 1 << 26
_SHOWN = 3


@dataclass(frozen=True)
class Contents:
    """The images of one split.

    `digest` is 16 hex digits of the images' content as far as is cheap: of files their class, their
    path within the split and their size. It is empty where a run of an earlier version tells of its
    data. `classes` has each class's number of images and digest, where that is known, and `files`
    each path's size in bytes, where the images are files and not too many.
    """

    digest: str
    images: int
    classes: Mapping[str, tuple[int, str]]
    files: Mapping[str, int] | None = None

    @classmethod
    def of_files(cls, entries: Iterable[tuple[str, str, int]]) -> Self:
        """Return those of files: class, path within the split, and size in bytes of each.

        One class after the other, sorted by name; in any order within.
        """
        whole, images = _hash(), 0
        classes: dict[str, tuple[int, str]] = {}
        files: dict[str, int] | None = {}
        for name, of_class in groupby(entries, lambda entry: entry[0]):
            group = sorted(of_class)
            digest = _hash(json.dumps(group).encode())
            whole.update(digest.digest())
            classes[name] = (len(group), digest.hexdigest())
            images += len(group)
            if files is not None:
                files |= {path: size for _, path, size in group}
                files = files if images <= _MOST_FILES else None
        return cls(whole.hexdigest(), images, classes, files)

    @classmethod
    def of_tensors(cls, images: Tensor, target: Tensor) -> Self:
        """Return those of images (N, C, S, S) uint8 with targets (N,) int64."""
        digest = _hash(repr(tuple(images.shape)).encode())
        for part in (images, target):
            digest.update(part.contiguous().numpy())
        return cls(digest.hexdigest(), len(images), {})

    @classmethod
    def of_parameters(cls, images: int, *values: Any) -> Self:
        """Return those of images that these plain values decide."""
        return cls(_hash(json.dumps([images, *values]).encode()).hexdigest(), images, {})

    @classmethod
    def of_description(cls, description: Mapping[str, Any], split: str) -> Self:
        """Return what run.json's `data` says of a split, "train" or "test".

        Raises ValueError, or what entries of the wrong kind raise, for what no run says.
        """
        digest, images = description.get(f"{split}_digest", ""), description[f"{split}_images"]
        if not isinstance(digest, str) or not isinstance(images, int):
            raise TypeError(f"it does not say what its {split} images are")
        return cls(digest, images, {})

    def to_state(self) -> dict[str, Any]:
        """Return plain values and tensors, for a checkpoint."""
        files = None
        if self.files is not None:
            text = json.dumps(list(self.files.items())).encode()
            files = torch.frombuffer(bytearray(zlib.compress(text)), dtype=torch.uint8)
        classes = {name: list(known) for name, known in self.classes.items()}
        return {"digest": self.digest, "images": self.images, "classes": classes, "files": files}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return what `to_state` was asked of.

        Raises ValueError, or what values of the wrong kind raise, for another state.
        """
        classes = {str(k): (int(n), str(digest)) for k, (n, digest) in state["classes"].items()}
        files = None
        if state["files"] is not None:
            unpacker = zlib.decompressobj()
            try:
                text = unpacker.decompress(state["files"].numpy().tobytes(), _MOST_BYTES)
            except zlib.error as error:
                raise ValueError(f"its list of files is damaged: {error}") from None
            files = {str(path): int(size) for path, size in json.loads(text)}
        return cls(str(state["digest"]), int(state["images"]), classes, files)

    def changed_to(self, now: "Contents") -> str | None:
        """Say what is no longer as it was, in one line; None where nothing is, or nothing shows."""
        if self.digest == now.digest:
            return None
        if self.files is not None and now.files is not None:
            return _changed_files(self.files, now.files)
        if self.classes and now.classes:
            return _changed_classes(self.classes, now.classes)
        if self.images != now.images:
            return f"{self.images:,} images then, and {now.images:,} now"
        return f"{now.images:,} images as before, but not the same ones" if self.digest else None


def _hash(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=8)


def _changed_files(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    kinds = {
        "removed": [path for path in before if path not in now],
        "added": [path for path in now if path not in before],
        "of another size": [path for path in now if before.get(path, now[path]) != now[path]],
    }
    told = ", ".join(
        f"{len(paths):,} {'image' if len(paths) == 1 else 'images'} {kind} ({_few(paths)})"
        for kind, paths in kinds.items()
        if paths
    )
    return told or "the same paths and sizes, in other classes"


def _changed_classes(
    before: Mapping[str, tuple[int, str]], now: Mapping[str, tuple[int, str]]
) -> str:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    told = ", ".join(_change_of_class(before, now, name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN:,} more classes" if len(names) > _SHOWN else ""
    return f"images of {len(names):,} {'class' if len(names) == 1 else 'classes'} ({told}{more})"


def _change_of_class(
    before: Mapping[str, tuple[int, str]], now: Mapping[str, tuple[int, str]], name: str
) -> str:
    was, is_now = (each[name][0] if name in each else 0 for each in (before, now))
    told = f"{was:,} {'image' if was == 1 else 'images'}" if was else "none"
    return f"{name!r}: {told}, now {f'{is_now:,}' if is_now else 'none'}"


def _few(names: Sequence[str]) -> str:
    told = ", ".join(map(repr, names[:_SHOWN]))
    return told if len(names) <= _SHOWN else f"{told} and {len(names) - _SHOWN:,} more"
