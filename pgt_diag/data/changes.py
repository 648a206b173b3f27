"""Whether data is still that of an earlier run, and what is not."""

from collections.abc import Mapping
from typing import Any

from pgt_diag.data.base import ImageData
from pgt_diag.data.contents import Contents
from pgt_diag.errors import DataError

SPLITS = ("train", "test")


def contents_state(data: ImageData) -> dict[str, Any]:
    """Return what a checkpoint keeps of its run's data."""
    return {name: each.to_state() for name, each in zip(SPLITS, data.contents, strict=True)}


def data_changes(
    data: ImageData, described: Mapping[str, Any], kept: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Say by split, "train" and "test", what is no longer as it was; nothing for one that is.

    described: the `data` of the earlier run's run.json; kept: what its checkpoint has of
    `contents_state`, if there is one, which knows more.

    Raises DataError when the classes are others: the network's outputs are those of the earlier
    ones.
    """
    before, now = list(described["classes"]), list(data.classes)
    if before != now:
        gone, new = ([each for each in one if each not in two] for one, two in
                     ((before, now), (now, before)))  # fmt: skip
        told = [f"{gone[0]!r} is gone" if gone else "", f"{new[0]!r} is new" if new else ""]
        raise DataError(
            f"the data has other classes than the run: {len(before):,} then, {len(now):,} now"
            + "".join(f", {each}" for each in told if each)
            + "; put them back, or start another run"
        )
    changes = {}
    for name, contents in zip(SPLITS, data.contents, strict=True):
        earlier = (
            Contents.from_state(kept[name]) if kept else Contents.of_description(described, name)
        )
        if (change := earlier.changed_to(contents)) is not None:
            changes[name] = change
    return changes


def check_description(described: Mapping[str, Any]) -> None:
    """Raise what entries of the wrong kind raise, unless data can be compared with run.json's."""
    if not all(isinstance(each, str) for each in described["classes"]):
        raise TypeError("its classes have no names")
    for split in SPLITS:
        Contents.of_description(described, split)


def check_training_set(changes: Mapping[str, str], run: str, *, accept: bool) -> None:
    """Raise DataError for a changed training set that is not accepted; run: whose it was."""
    if "train" in changes and not accept:
        raise DataError(
            f"the training set is not that of {run}: {changes['train']}; put it back, start "
            "another run, or go on with it as it is: `accept_changed_data=True`"
        )
