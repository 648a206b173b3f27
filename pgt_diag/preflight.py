"""Mistakes in a configuration that can be told before torch is loaded, which takes seconds.

Whatever is refused here is refused without this module too, in the same words: by those who then
need what is missing.
"""

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from pgt_diag.config import TIMM, DatasetName, RunConfig, Stem, has_stem
from pgt_diag.errors import ConfigurationError, DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TRAINING_DIGITS = 1438
_CIFARS = {
    DatasetName.CIFAR10: ("CIFAR10", "cifar-10-batches-py"),
    DatasetName.CIFAR100: ("CIFAR100", "cifar-100-python"),
}
"""torchvision's name for each, and for the folder that it unpacks the archive to."""
_NO_FOLDER = (DatasetName.DIGITS, DatasetName.SYNTHETIC)
_REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)


def check_choices(config: RunConfig, processes: int = 1) -> None:
    """Raise ConfigurationError for what no data and no machine would make right."""
    check_shares(config, processes)
    check_folder_use(config)
    if config.dataset is DatasetName.SYNTHETIC:
        check_synthetic(config)
        check_batch(config, config.synthetic_images)
    elif config.dataset is DatasetName.DIGITS:
        check_batch(config, TRAINING_DIGITS)
    check_model(config.model, config.stem)


def check_there(config: RunConfig) -> None:
    """Raise DataError unless the data set is on this machine, as far as a look at it tells."""
    folder = data_folder(config)
    if config.dataset is DatasetName.IMAGEFOLDER and folder is not None:
        find_splits(folder)
    elif config.dataset is DatasetName.FASHION_MNIST:
        find_fashion_mnist(folder)
    elif config.dataset in _CIFARS:
        name, inner = _CIFARS[config.dataset]
        root = folder or download_folder()
        if not (root / inner).is_dir():
            raise no_cifar(name, root)


def check_download(config: RunConfig) -> None:
    """Raise ConfigurationError for a data set that nobody offers."""
    if config.dataset is DatasetName.IMAGEFOLDER:
        raise ConfigurationError("imagefolder cannot be downloaded; drop `download=True`")


def check_batch(config: RunConfig, training_images: int) -> None:
    """Raise ConfigurationError for a batch that is larger than the training set."""
    if config.batch_size > training_images:
        raise ConfigurationError(
            f"batch_size is {config.batch_size}, but {config.dataset} has only {training_images} "
            "training images"
        )


def check_synthetic(config: RunConfig) -> None:
    """Raise ConfigurationError unless every made-up class has an image."""
    count, classes = config.synthetic_images, config.synthetic_classes
    if count < classes:
        raise ConfigurationError(f"synthetic_images is {count}, fewer than the {classes} classes")


def check_model(name: str, stem: Stem) -> None:
    """Raise ConfigurationError for a network that nobody has, or that has no small stem."""
    if "torchvision" in sys.modules:  # which knows its networks better than its files tell
        return
    if name.startswith(TIMM):
        if importlib.util.find_spec("timm") is None:
            raise missing_timm(name, "No module named 'timm'")
        return
    names = _torchvision_names()
    if names and name not in names:
        raise unknown_model(name, names, "torchvision.models.list_models()")
    if names and stem is Stem.SMALL and not has_stem(name):
        raise no_small_stem(name)


def check_shares(config: RunConfig, processes: int) -> None:
    """Raise ConfigurationError unless every process has an image of every part of a batch."""
    if config.batch_size < processes * config.accumulate:
        raise ConfigurationError(
            f"batch_size is {config.batch_size}: {processes} processes, with accumulate "
            f"{config.accumulate}, need at least {processes * config.accumulate} images"
        )


def check_folder_use(config: RunConfig) -> None:
    """Raise ConfigurationError for a folder that the data set does not read, or that it lacks."""
    dataset = config.dataset
    if dataset in _NO_FOLDER and config.data is not None:
        raise ConfigurationError(
            f"data is {config.data!r}, but dataset is {dataset}, which reads no folder"
        )
    if dataset is DatasetName.IMAGEFOLDER and config.data is None:
        raise ConfigurationError("dataset is imagefolder; name its folder with `data=DIR`")


def no_small_stem(model: str) -> ConfigurationError:
    """Return the error for the small stem of a network that has none to make small."""
    return ConfigurationError(
        f"stem is small and model is {model}; only ResNets have that stem: use stem imagenet"
    )


def unknown_model(name: str, names: Iterable[str], place: str) -> ConfigurationError:
    """Return the error for a name that is not among those of `place`, with the nearest ones."""
    near = difflib.get_close_matches(name.lower(), list(names), n=3)
    meant = f"did you mean {' or '.join(near)}?" if near else f"take one that {place} names"
    return ConfigurationError(f"model is {name!r}, and there is none; {meant}")


def no_cifar(name: str, root: Path) -> DataError:
    """Return the error for a folder in which there is no intact CIFAR of that name."""
    return DataError(
        f"{name}: no intact copy in {root} (torchvision's layout, checked by MD5); "
        "use `download=True`, or name its folder with `data=DIR`"
    )


def data_folder(config: RunConfig) -> Path | None:
    """Return the configured folder, `~` expanded, or None."""
    return None if config.data is None else _expand(Path(config.data))


def download_folder() -> Path:
    """Return where `--download` puts data sets when no folder is named."""
    return _expand(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "pgt-diag"


def find_splits(root: Path) -> str:
    """Return the name of an image folder's test split; DataError unless both splits are there."""
    test_name = "val" if (root / "val").is_dir() else "test"
    for name, shown in (("train", "'train'"), (test_name, "'val' (or 'test')")):
        if not (root / name).is_dir():
            raise DataError(
                f"no folder {shown} in {str(root)!r}; "
                "expected images in DIR/train/CLASS/ and DIR/val/CLASS/"
            )
    return test_name


def find_fashion_mnist(folder: Path | None) -> list[Path]:
    """Return Fashion-MNIST's four files, as IDX_NAMES orders them; DataError unless all are there.

    Without a folder: in Debian's place, then in the one that `--download` writes to.
    """
    roots = [folder] if folder else [DEBIAN_FASHION_MNIST, download_folder()]
    places = [place for root in roots for place in (root, root / "FashionMNIST" / "raw")]
    for place in places:
        found = [
            next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)
            for name in IDX_NAMES
        ]
        files = [path for path in found if path]
        if len(files) == len(found):
            return files
    raise DataError(
        f"fashion-mnist: {IDX_NAMES[0]}[.gz] and its three companions are not in {places[0]}; "
        "get them with 'apt install dataset-fashion-mnist' or `download=True`, "
        "or name their folder with `data=DIR`"
    )


def missing_timm(name: str, reason: object) -> ConfigurationError:
    """Return the error for one of timm's networks where timm is not installed."""
    return ConfigurationError(
        f"model is {name}, and timm is not there ({reason}); "
        "install it with: pip install 'pgt-diag[timm]'"
    )


@cache
def _torchvision_names() -> list[str]:
    """Return the names that torchvision's files register; none if they do it in another way."""
    package = importlib.util.find_spec("torchvision")
    names: list[str] = []
    for folder in (package and package.submodule_search_locations) or ():
        for file in sorted(Path(folder, "models").glob("*.py")):
            names += _REGISTERED.findall(file.read_text(encoding="utf-8"))
    return sorted(names) if RunConfig.model in names else []


def _expand(path: Path) -> Path:
    with suppress(RuntimeError):  # ~somebody who is unknown here: then it is a folder's own name
        return path.expanduser()
    return path
