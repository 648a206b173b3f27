"""Folders in which some images cannot be read: what stands in for them, and what is recorded."""

import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from pgt_diag.config import BadImages, DatasetName, RunConfig
from pgt_diag.data import BadImage, load_data
from pgt_diag.data import images as images_module
from pgt_diag.data.base import random_number, seeded
from pgt_diag.data.images import decode
from pgt_diag.errors import DataError

CLASSES = {"eight": 8, "one": 1, "two": 2}
BATCH = 4
TRUNCATED = "image file is truncated"
NO_IMAGE = "not an image of a known format"

# file: (its replacement by hand, why)
BAD_TRAIN = {
    "eight/2.jpg": ("eight/3.jpg", NO_IMAGE),
    "one/0.jpg": ("one/1.jpg", TRUNCATED),
    "two/4.jpg": ("two/0.jpg", NO_IMAGE),
    "two/5.jpg": ("two/0.jpg", TRUNCATED),
}
BAD_TEST = {
    "one/2.jpg": ("one/0.jpg", TRUNCATED),
    "two/0.jpg": ("two/1.jpg", NO_IMAGE),
}


def picture(label, number):
    digits = load_digits()
    pixels = digits.images[digits.target == label][number] * (255 / 16)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB").resize((40 + number, 48))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Real JPEG files, 6 training and 3 test images a class: gray, CMYK, turned, and bad ones."""
    root = tmp_path_factory.mktemp("spoilt")
    for split, count in (("train", 6), ("val", 3)):
        for name, label in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture(label, number).save(root / split / name / f"{number}.jpg")
    train, val = root / "train", root / "val"
    picture(8, 3).convert("L").save(train / "eight" / "3.jpg")
    picture(2, 0).convert("CMYK").save(train / "two" / "0.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1, 1).save(train / "one" / "1.jpg", exif=turned)
    picture(2, 1).convert("CMYK").save(val / "two" / "1.jpg")

    (train / "eight" / "2.jpg").write_bytes(b"")
    truncate(train / "one" / "0.jpg")
    (train / "two" / "4.jpg").write_text("<html>not found</html>")
    truncate(train / "two" / "5.jpg")
    truncate(val / "one" / "2.jpg")
    (val / "two" / "0.jpg").write_bytes(b"")
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data")


def open_folder(root, bad_images=BadImages.SKIP, **options):
    options = {"batch_size": BATCH, "image_size": 32, "workers": 0, **options}
    return load_data(
        RunConfig(dataset=DatasetName.IMAGEFOLDER, data=str(root), bad_images=bad_images, **options)
    )


def reference(root, split, bad, epoch=None):
    """Every image and target of a split by a plain loop, the replacements written out above."""
    crop = [v2.Resize(37), v2.CenterCrop(32)]
    if epoch is not None:
        crop = [v2.RandomResizedCrop(32, (0.08, 1), (3 / 4, 4 / 3))]
    flip = v2.RandomHorizontalFlip() if epoch is not None else v2.Identity()
    transform = v2.Compose([v2.PILToTensor(), *crop, flip])
    folder = torchvision.datasets.ImageFolder(root / split)
    images = []
    for index, (path, _) in enumerate(folder.samples):
        name = os.path.relpath(path, root / split)
        path = root / split / bad.get(name, (name,))[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_number("augment", 0, epoch, index))
            images.append(transform(folder.loader(path)))
    mean, std = (
        255 * torch.tensor(values).view(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (torch.stack(images) - mean) / std, torch.tensor(folder.targets)


def train_reference(root, epoch):
    images, target = reference(root, "train", BAD_TRAIN, epoch)
    order = torch.randperm(18, generator=seeded("order", 0, epoch))[:16]
    return list(zip(images[order].split(BATCH), target[order].split(BATCH), strict=True))


def assert_batches(batches, expected):
    batches = list(batches)
    assert len(batches) == len(expected)
    for (images, target), (images_wanted, target_wanted) in zip(batches, expected, strict=True):
        assert torch.allclose(images, images_wanted, atol=1e-5)
        assert torch.equal(target, target_wanted)


def assert_equal_bits(one, two):
    for parts in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


def recorded(bad, split):
    """As (path, replacement, start of the reason)."""
    return {(f"{split}/{name}", f"{split}/{used}", why) for name, (used, why) in bad.items()}


def shortened(bad_images):
    return {(bad.path, bad.replaced_by, bad.reason.split(" (")[0]) for bad in bad_images}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_by_the_next_of_their_class_in_every_epoch(root, workers):
    data = open_folder(root, workers=workers)
    for epoch in (0, 1, 0):
        assert_batches(data.train_batches(epoch), train_reference(root, epoch))
        assert_batches(data.train_batches(epoch, start=2), train_reference(root, epoch)[2:])
    images, target = reference(root, "val", BAD_TEST)
    expected = list(zip(images.split(BATCH), target.split(BATCH), strict=True))
    assert_batches(data.test_batches(), expected)
    assert (data.train_size, data.test_size) == (18, 9)
    assert shortened(data.bad_images) == recorded(BAD_TRAIN, "train") | recorded(BAD_TEST, "val")
    paths = [bad.path for bad in data.bad_images]
    assert paths == sorted(paths)
    assert len(paths) == len(set(paths))


def test_batches_and_records_are_the_same_for_any_number_of_workers(root):
    alone = open_folder(root)
    for workers in (1, 2):
        helped = open_folder(root, workers=workers)
        assert_equal_bits(helped.train_batches(5), alone.train_batches(5))
        assert_equal_bits(helped.test_batches(), alone.test_batches())
        assert helped.bad_images == alone.bad_images
        assert helped.bad_images


@pytest.mark.parametrize("start", range(5))
def test_a_resume_has_the_same_batches_and_records_only_what_it_met(root, start):
    whole = list(open_folder(root).train_batches(2))
    records = []
    for workers in (0, 2):
        data = open_folder(root, workers=workers)
        assert_equal_bits(data.train_batches(2, start=start), whole[start:])
        records.append(data.bad_images)
    assert records[0] == records[1]
    order = torch.randperm(18, generator=seeded("order", 0, 2))[start * BATCH : 16]
    names = {f"{list(CLASSES)[i // 6]}/{i % 6}.jpg" for i in order.tolist()} & BAD_TRAIN.keys()
    if "two/4.jpg" in names:
        names.add("two/5.jpg")  # passed over
    assert [bad.path for bad in records[0]] == [f"train/{name}" for name in sorted(names)]


def test_sample_images_are_replaced_too(root):
    data = open_folder(root)
    images, originals, target = data.sample_images(9)
    assert target.tolist() == [0, 1, 2] * 3
    expected, _ = reference(root, "val", BAD_TEST)
    by_class = torch.arange(9).view(3, 3).T.flatten()
    assert torch.allclose(images, expected[by_class], atol=1e-5)
    assert torch.equal(originals[2], originals[5])
    assert shortened(data.bad_images) == recorded(BAD_TEST, "val")


def test_a_bad_image_is_decoded_once_in_a_process(root, monkeypatch):
    tried = []

    def counting(path):
        tried.append(path)
        return decode(path)

    monkeypatch.setattr(images_module, "decode", counting)
    data = open_folder(root)
    for epoch in range(4):
        list(data.train_batches(epoch))
    for name in BAD_TRAIN:
        assert tried.count(str(root / "train" / name)) == 1, name
    assert len(tried) == 4 * 16 + len(BAD_TRAIN)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_any_readable_image_is_an_error_that_names_its_folder(root, split, workers):
    for path in (root / split / "one").iterdir():
        path.write_bytes(b"")
    count = {"train": 6, "val": 3}[split]
    data = open_folder(root, workers=workers)
    expected = (
        rf"none of the {count} images in class folder '.*{split}/one' can be read.*{NO_IMAGE}"
    )
    with pytest.raises(DataError, match=expected) as caught:
        list(data.train_batches(0) if split == "train" else data.test_batches())
    assert "\n" not in str(caught.value)


def test_a_class_with_one_readable_image_consists_of_it(root):
    for number in (0, 1, 2, 4, 5):
        (root / "train" / "one" / f"{number}.jpg").write_bytes(b"")
    data = open_folder(root, batch_size=18)
    list(data.train_batches(0))
    ones = [bad for bad in data.bad_images if "/one/" in bad.path]
    assert [bad.path[-5] for bad in ones] == list("01245")
    assert {bad.replaced_by for bad in ones} == {"train/one/3.jpg"}


@pytest.mark.parametrize("workers", [0, 2])
def test_by_default_a_bad_image_stops_the_run_and_the_error_tells_of_skip(root, workers):
    data = open_folder(root, RunConfig.bad_images, workers=workers)
    with pytest.raises(DataError, match=r"cannot read image '.*jpg': .*`bad_images=\"skip\"`$"):
        list(data.train_batches(0))
    assert data.bad_images == ()


@pytest.mark.parametrize("bad_images", list(BadImages))
def test_nothing_is_recorded_where_all_is_well(root, bad_images):
    for split, bad in (("train", BAD_TRAIN), ("val", BAD_TEST)):
        for name in bad:
            (root / split / name).unlink()
    data = open_folder(root, bad_images)
    list(data.train_batches(0))
    list(data.test_batches())
    assert data.bad_images == ()
    assert load_data(RunConfig(batch_size=64)).bad_images == ()


def test_records_hold_no_path_of_this_machine_and_are_plain_json_whatever_the_names(root):
    (root / "train" / "one").rename(os.fsdecode(os.fsencode(root / "train") + b"/\xff\x1b<b>"))
    (root / "val" / "one").rename(os.fsdecode(os.fsencode(root / "val") + b"/\xff\x1b<b>"))
    data = open_folder(root, batch_size=18)
    list(data.train_batches(0))
    text = json.dumps([asdict(bad) for bad in data.bad_images], ensure_ascii=False)
    text.encode()
    assert str(root) not in text
    assert data.bad_images[-1] == BadImage(
        "train/\ufffd\x1b<b>/0.jpg", "train/\ufffd\x1b<b>/1.jpg", data.bad_images[-1].reason
    )


def test_a_pipe_and_a_vanished_file_are_replaced_as_well(root):
    data = open_folder(root, batch_size=18)
    (root / "train" / "eight" / "0.jpg").unlink()
    (root / "train" / "eight" / "1.jpg").unlink()
    os.mkfifo(root / "train" / "eight" / "1.jpg")
    list(data.train_batches(0))
    reasons = {bad.path: (bad.replaced_by, bad.reason) for bad in data.bad_images}
    used = "train/eight/3.jpg"
    assert reasons["train/eight/0.jpg"] == (used, "No such file or directory")
    assert reasons["train/eight/1.jpg"] == (used, "not a plain file")
