"""The digests that tell one data set from another, and the words for what differs."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
import torch

from pgt_diag.config import DatasetName, RunConfig
from pgt_diag.data import contents as contents_module
from pgt_diag.data import load_data
from pgt_diag.data.contents import Contents

FILES = [("cat", "cat/1.jpg", 10), ("cat", "cat/2.jpg", 20), ("dog", "dog/1.jpg", 30)]


def short_hash(data):
    return hashlib.blake2b(data, digest_size=8)


def of(*entries):
    return Contents.of_files(sorted(entries))


def digests(**options):
    description = load_data(RunConfig(**{"batch_size": 1, **options})).description()
    return description["train_digest"], description["test_digest"]


@pytest.fixture
def folder(tmp_path):
    """A folder whose images are only listed here: any bytes will do."""
    for split in ("train", "val"):
        for _, path, size in FILES:
            file = tmp_path / "data" / split / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(size))
    return tmp_path / "data"


def folder_digests(folder):
    return digests(dataset=DatasetName.IMAGEFOLDER, data=str(folder), workers=0)


def test_a_folders_digest_is_of_classes_paths_and_sizes(folder, tmp_path):
    cat, dog = (short_hash(json.dumps(part).encode()) for part in (FILES[:2], FILES[2:]))
    expected = short_hash(cat.digest() + dog.digest()).hexdigest()
    assert folder_digests(folder) == (expected, expected)
    folder.rename(tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "train" / "cat" / "1.jpg", (0, 0))
    assert folder_digests(tmp_path / "elsewhere") == (expected, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "cat/1.jpg").unlink(),
        lambda place: (place / "cat/1.jpg").rename(place / "cat/3.jpg"),
        lambda place: (place / "cat/1.jpg").rename(place / "dog/3.jpg"),
        lambda place: (place / "cat/1.jpg").write_bytes(bytes(11)),
        lambda place: (place / "dog/3.jpg").write_bytes(bytes(1)),
    ],
)
def test_whatever_changes_in_a_split_changes_its_digest_alone(folder, change):
    train, test = folder_digests(folder)
    change(folder / "train")
    changed, same = folder_digests(folder)
    assert changed != train
    assert same == test


def test_images_in_memory_are_hashed_with_their_labels(monkeypatch):
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    target = torch.tensor([0, 1])
    data = repr((2, 3, 4, 4)).encode() + images.numpy().tobytes() + target.numpy().tobytes()
    found = Contents.of_tensors(images, target)
    assert found.digest == short_hash(data).hexdigest()
    assert Contents.of_tensors(images, target.flip(0)).digest != found.digest
    assert Contents.of_tensors(images.flip(0), target).digest != found.digest
    assert Contents.of_tensors(images.view(2, 3, 2, 8), target).digest != found.digest
    # As stored in memory makes no difference.
    assert Contents.of_tensors(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
                               target).digest == found.digest  # fmt: skip


def test_the_digits_are_the_same_at_every_size_and_seed():
    found = digests()
    assert all(len(each) == 16 and int(each, 16) for each in found)
    assert found[0] != found[1]
    assert digests(image_size=16, seed=7, batch_size=32) == found


def test_made_up_images_are_told_by_what_decides_them():
    made_up = {"dataset": DatasetName.SYNTHETIC, "synthetic_images": 40}
    found = digests(**made_up)
    assert digests(**made_up, seed=9, batch_size=8) == found
    others = [{"image_size": 16}, {"synthetic_classes": 4}, {"synthetic_images": 80}]
    assert len({found, *(digests(**{**made_up, **each}) for each in others)}) == 4


# What differs, in words


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (FILES, None),
        (FILES[1:], "1 image removed ('cat/1.jpg')"),
        ([*FILES, ("dog", "dog/2.jpg", 5)], "1 image added ('dog/2.jpg')"),
        ([("cat", "cat/1.jpg", 11), *FILES[1:]], "1 image of another size ('cat/1.jpg')"),
        (
            [("cat", "cat/1.jpg", 20), ("cat", "cat/2.jpg", 10), ("dog", "dog/7.jpg", 30)],
            "1 image removed ('dog/1.jpg'), 1 image added ('dog/7.jpg'), "
            "2 images of another size ('cat/1.jpg', 'cat/2.jpg')",
        ),
        (
            [(name, f"{name}/{n}.jpg", 1) for name in ("cat", "dog") for n in range(10, 20)],
            "3 images removed ('cat/1.jpg', 'cat/2.jpg', 'dog/1.jpg'), "
            "20 images added ('cat/10.jpg', 'cat/11.jpg', 'cat/12.jpg' and 17 more)",
        ),
    ],
)
def test_what_changed_is_counted_and_named(now, told):
    before = of(*FILES)
    assert before.changed_to(of(*now)) == told
    assert kept(before).changed_to(of(*now)) == told


def kept(contents):
    """As a checkpoint keeps and reads it."""
    file = io.BytesIO()
    torch.save(contents.to_state(), file)
    file.seek(0)
    return Contents.from_state(torch.load(file, weights_only=True))


def test_of_very_many_files_the_classes_are_told(monkeypatch):
    monkeypatch.setattr(contents_module, "_MOST_FILES", 2)
    before = kept(of(*FILES))
    assert before.files is None
    assert before.changed_to(of(*FILES)) is None
    told = before.changed_to(of(FILES[0], ("dog", "dog/1.jpg", 31)))
    assert told == "images of 2 classes ('cat': 2 images, now 1, 'dog': 1 image, now 1)"
    many = of(*((f"c{n}", f"c{n}/1.jpg", 1) for n in range(9)))
    assert before.changed_to(many).endswith("'c2': none, now 1 and 8 more classes)")


def test_what_is_kept_of_many_files_is_small():
    names = (f"n{label:08}" for label in range(100))
    dice = np.random.default_rng(0)
    entries = [
        (name, f"{name}/{name}_{number}.JPEG", int(dice.integers(1 << 17)))
        for name in names
        for number in range(1000)
    ]
    contents = of(*entries)
    assert contents.files is not None
    assert contents.to_state()["files"].numel() < 1_000_000
    assert of(*entries, ("n1", "n1/x.JPEG", 1)).files is None


def test_of_a_run_that_told_no_digest_only_counts_are_compared():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    now = Contents.of_tensors(images, torch.zeros(3, dtype=torch.long))
    told = {"train_images": 3, "test_images": 4}
    assert Contents.of_description(told, "train").changed_to(now) is None
    assert Contents.of_description(told, "test").changed_to(now) == "4 images then, and 3 now"
    other = Contents.of_description({**told, "train_digest": "0" * 16}, "train")
    assert other.changed_to(now) == "3 images as before, but not the same ones"


@pytest.mark.parametrize(
    "damage",
    [
        {"files": torch.zeros(9, dtype=torch.uint8)},
        {"classes": {"cat": 3}},
        {"classes": 7},
        {"images": "many"},
        {"files": "x"},
    ],
)
def test_a_damaged_state_is_an_error_that_a_resume_expects(damage):
    state = {**of(*FILES).to_state(), **damage}
    with pytest.raises((AttributeError, TypeError, ValueError)):
        Contents.from_state(state)
