"""Which images an ImageNet-style folder holds, found without leaving it.

Links are followed only inside the data folder: a stranger's folder must bring neither the names
nor the images of other places on this machine into a report.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from pgt_diag.errors import DataError
from pgt_diag.preflight import find_splits

_UNREAD_IMAGES = (".gif", ".jfif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg")
"""How names of images end that no torchvision folder takes for one, and people often do."""


@dataclass
class LeftOut:
    """What lies in a split and is no image of it.

    `hidden`: paths within the data folder, of folders and files; `endings`: of how many other files
    the names end how.
    """

    hidden: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)

    @property
    def unread_images(self) -> dict[str, int]:
        """How many files are images by their names, but of a kind that is not read."""
        return {end: count for end, count in self.endings.items() if end in _UNREAD_IMAGES}


@dataclass(frozen=True)
class Split:
    """One split: class names in order, image files in torchvision's order, targets (N,) int64.

    The class folders lie in `folder`, and that in the data folder `root`. Hidden folders and files
    are no part of it: they are what other programs have put there.
    """

    root: Path
    folder: Path
    classes: list[str]
    paths: list[str]
    target: Tensor
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def counts(self) -> list[int]:
        """How many images each class has."""
        counts: list[int] = torch.bincount(self.target, minlength=len(self.classes)).tolist()
        return counts


def list_splits(root: Path) -> tuple[Split, Split, str]:
    """List `train` and `val` (or `test`) of a data folder; also return the latter's name.

    Raises DataError when a folder is missing, empty or unreadable, has fewer than two classes, a
    class has no image, the two splits differ in their classes, or a link leads out of `root`.
    """
    test_name = find_splits(root)
    try:
        train, test = _list_split(root, "train"), _list_split(root, test_name)
    except OSError as error:
        raise DataError(f"cannot list {error.filename!r}: {error.strerror}") from None
    differing = sorted(set(train.classes) ^ set(test.classes))
    if differing:
        raise DataError(
            f"the class folders of 'train' and '{test_name}' in {str(root)!r} differ: "
            f"{differing[0]!r} is in one of them only ({len(differing)} such)"
        )
    return train, test, test_name


def _list_split(root: Path, name: str) -> Split:
    folder = root / name
    _check_inside(root, folder)
    left_out = LeftOut()
    folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    classes = [entry for entry in folders if not _is_hidden(entry)]
    left_out.hidden += [f"{name}/{entry}" for entry in folders if _is_hidden(entry)]
    if len(classes) < 2:
        raise DataError(f"at least 2 class folders are needed in {str(folder)!r}: {classes} found")
    paths: list[str] = []
    counts: list[int] = []
    for class_name in classes:
        of_class = LeftOut()
        # torchvision's order: one folder after the other, by name within each
        found = sorted(_image_files(root, folder / class_name, of_class), key=os.path.split)
        if not found:
            raise DataError(
                f"no image in class folder {str(folder / class_name)!r}: {_why_none(of_class)}"
            )
        paths += found
        counts.append(len(found))
        left_out.hidden += of_class.hidden
        left_out.endings += of_class.endings
    target = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Split(root, folder, classes, paths, target, left_out)


def _image_files(root: Path, folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield the image files in a class folder and the folders below it; note what else is there."""
    _check_inside(root, folder)
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    left_out.hidden.append(os.path.relpath(entry.path, root))
                    continue
                if entry.is_symlink():
                    _check_inside(root, Path(entry.path))
                    if entry.is_dir():  # may lead back to where it is
                        raise DataError(f"{entry.path!r}, below a class, is a link to a folder")
                if entry.is_dir():
                    pending.append(entry.path)
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    yield entry.path
                else:
                    left_out.endings[Path(entry.name).suffix.lower()] += 1


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _why_none(left_out: LeftOut) -> str:
    """Say what a folder holds instead of images, and what to do."""
    if not left_out.endings:
        return "all that is in it is hidden" if left_out.hidden else "it is empty"
    [(ending, count)] = left_out.endings.most_common(1)
    files = f"{count:,} file{'s'[: count != 1]}"
    what = f"{files} ending in {ending!r}" if ending else f"{files} without an ending"
    return f"it has {what}, and only {', '.join(IMG_EXTENSIONS)} are read; convert or rename them"


def _check_inside(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{str(path)!r} is a link that leaves the data folder {str(root)!r}")
