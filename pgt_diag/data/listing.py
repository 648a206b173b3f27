"""Which images an ImageNet-style folder holds, found without leaving it.

Links are followed only inside the data folder: a stranger's folder must bring neither the names
nor the images of other places on this machine into a report.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from pgt_diag.errors import DataError
from pgt_diag.preflight import find_splits


@dataclass(frozen=True)
class Split:
    """One split: class names in order, image files in torchvision's order, targets (N,) int64.

    The class folders lie in `folder`, and that in the data folder `root`.
    """

    root: Path
    folder: Path
    classes: list[str]
    paths: list[str]
    target: Tensor


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
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"at least 2 class folders are needed in {str(folder)!r}: {classes} found")
    paths: list[str] = []
    counts: list[int] = []
    for class_name in classes:
        # torchvision's order: one folder after the other, by name within each
        found = sorted(_image_files(root, folder / class_name), key=os.path.split)
        if not found:
            raise DataError(f"no image in class folder {str(folder / class_name)!r}")
        paths += found
        counts.append(len(found))
    target = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Split(root, folder, classes, paths, target)


def _image_files(root: Path, folder: Path) -> Iterator[str]:
    """Yield the image files in a class folder and the folders below it."""
    _check_inside(root, folder)
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _check_inside(root, Path(entry.path))
                    if entry.is_dir():  # may lead back to where it is
                        raise DataError(f"{entry.path!r}, below a class, is a link to a folder")
                if entry.is_dir():
                    pending.append(entry.path)
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    yield entry.path


def _check_inside(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{str(path)!r} is a link that leaves the data folder {str(root)!r}")
