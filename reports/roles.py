"""What each field of a configuration means to a comparison of two runs: it has exactly one role."""

from collections.abc import Mapping, Sequence
from typing import Any

from pgt_diag.text import printable
from reports.source import Run

METHOD = ("method", "alpha", "clip_norm", "agc_clip_factor", "agc_eps", "agc_classifier")
"""What is compared: a method and its own options."""

SETTING = ("model", "dataset", "epochs", "norm", "stem", "image_size", "augment")
"""What two runs must share, beside data, batch size and seed, for a difference to mean anything."""

PAIRED = ("batch_size", "seed")
"""What a pair shares as well; runs that differ in the seed alone are repetitions."""

DATA = ("data", "synthetic_images", "synthetic_classes")
"""Where the images come from: `data_of` compares the images themselves."""

RECIPE = (
    "lr", "weight_decay", "momentum", "nesterov", "decay_biases", "schedule", "step_epochs",
    "warmup_epochs", "warmup_lr", "warmup_prefix", "cooldown_epochs", "min_lr", "lr_update",
    "label_smoothing", "amp", "accumulate", "decode", "bad_images", "min_spell",
)  # fmt: skip
"""What a pair should share; where it does not, the difference is not the method's alone."""

INERT = (
    "lr_rule", "lr_base_batch", "workers", "device", "cuda_graph", "threads", "deterministic",
    "checkpoint_every", "record_every", "feature_map_layer", "feature_map_images",
    "feature_map_snapshots",
)  # fmt: skip
"""What changes a result by no more than rounding. What made a learning rate shows in `lr`."""

ROLES = {
    "method": METHOD,
    "setting": SETTING,
    "paired": PAIRED,
    "data": DATA,
    "recipe": RECIPE,
    "inert": INERT,
}


def trained_with(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    """Return what a run was trained with as text: not what was asked for, where that differs."""
    if run.config is None:
        return ()
    found = {
        "lr": run.config.peak_lr,
        "bad_images": "some" if run.info.get("bad_images") else "none",
    }
    if run.info.get("amp") is not None:
        found["amp"] = run.info["amp"]
    return tuple(str(found.get(key, getattr(run.config, key))) for key in keys)


def data_of(runs: Sequence[Run]) -> list[int]:
    """Return a number for each run: the same where they have the same images.

    Runs that recorded a digest of both sets are compared by these, others by the name, classes,
    size and number of the images. The path says nothing: the same images may lie anywhere.
    """
    kinds: list[list[Mapping[str, Any]]] = []
    numbers = []
    for run in runs:
        data = _description(run)
        fitting = (
            place for place, known in enumerate(kinds) if all(_same(data, each) for each in known)
        )
        number = next(fitting, len(kinds))
        if number == len(kinds):
            kinds.append([])
        kinds[number].append(data)
        numbers.append(number)
    return numbers


def data_label(run: Run, others: Sequence[Run]) -> str:
    """Return what tells a run's data from the others': '10 classes, 1,438 + 359 images'."""
    mine, rest = _description(run), [_description(each) for each in others]
    shown = []
    if any(_count(each["classes"]) != _count(mine["classes"]) for each in rest):
        shown.append(f"{_count(mine['classes'])} classes")
    shown += [
        f"{mine[part]} {part.replace('_', ' ')}"
        for part in ("train_images", "test_images")
        if any(each[part] != mine[part] for each in rest)
    ]
    if any(each["image_size"] != mine["image_size"] for each in rest):
        shown.append(f"{mine['image_size']} pixels")
    if not shown:
        shown.append(f"digest {' '.join(map(str, _digests(mine))) or 'unknown'}")
    return printable("data of " + ", ".join(shown))


_COMPARED = ("name", "classes", "train_images", "test_images", "image_size")


def _description(run: Run) -> Mapping[str, Any]:
    """Return what run.json says of the data, or what the configuration asks for."""
    recorded = run.info.get("data")
    data = dict(recorded) if isinstance(recorded, Mapping) else {}
    config = run.config
    synthetic = config is not None and config.dataset == "synthetic"
    asked = {
        "name": str(config.dataset) if config else None,
        "classes": config.synthetic_classes if config and synthetic else None,
        "train_images": config.synthetic_images if config and synthetic else None,
        "image_size": config.image_size if config else None,
    }
    return {key: data.get(key, asked.get(key)) for key in (*_COMPARED, *_DIGESTS)}


_DIGESTS = ("train_digest", "test_digest")


def _digests(data: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(data[key] for key in _DIGESTS if data[key] is not None)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    mine, theirs = _digests(one), _digests(other)
    if len(mine) == len(theirs) == len(_DIGESTS):
        return mine == theirs and one["image_size"] == other["image_size"]
    return all(one[key] == other[key] for key in _COMPARED)


def _count(classes: Any) -> Any:
    return len(classes) if isinstance(classes, list | tuple) else classes
