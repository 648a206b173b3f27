"""ImageNet-style folders: real image files, worker processes, damage, and hostile folders."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from commands.app import main
from pgt_diag.config import Augment, DatasetName, RunConfig
from pgt_diag.data import fetch_data, load_data
from pgt_diag.data import images as images_module
from pgt_diag.data.images import decode
from pgt_diag.errors import ConfigurationError, DataError

CLASSES = ("one", "seven", "two")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def digit_image(label, number, size=(40, 48)):
    digits = load_digits()
    pixels = digits.images[digits.target == label][number] * (255 / 16)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB").resize(size)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Digits 1, 7 and 2 as real JPEG files: 6 training and 3 test images of each class."""
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 6), ("val", 3)):
        for name, label in zip(CLASSES, (1, 7, 2), strict=True):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                digit_image(label, number, (40 + number, 48)).save(place / f"{number}.jpg")
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data")


def open_folder(root, **options):
    options = {"batch_size": 5, "image_size": 32, "workers": 0, **options}
    return load_data(RunConfig(dataset=DatasetName.IMAGEFOLDER, data=str(root), **options))


def all_batches(batches):
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def assert_same_batches(one, two):
    one, two = list(one), list(two)
    assert len(one) == len(two)
    for (images, target), (images_two, target_two) in zip(one, two, strict=True):
        assert torch.equal(images, images_two)
        assert torch.equal(target, target_two)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# What is read


def test_test_images_equal_torchvisions_image_folder_and_transforms(root):
    (root / "val" / "two" / "deeper").mkdir()
    digit_image(2, 9).save(root / "val" / "two" / "deeper" / "0.PNG")
    digit_image(2, 8).save(root / "val" / "two" / "z.jpg")
    (root / "val" / "two" / "notes.txt").write_text("no image")
    # 224 ↔ 256 is 32 ↔ 36.57
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(37),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*IMAGENET),
        ]
    )
    reference = torchvision.datasets.ImageFolder(root / "val", transform)
    data = open_folder(root)
    images, target = all_batches(data.test_batches())
    assert target.tolist() == reference.targets
    assert torch.allclose(images, torch.stack([image for image, _ in reference]), atol=1e-5)
    assert data.classes == CLASSES
    assert (data.train_size, data.test_size, data.batches_per_epoch) == (18, 11, 3)


def test_images_are_224_pixels_unless_asked_otherwise(root):
    data = open_folder(root, image_size=None)
    images, target = next(data.train_batches(0))
    assert images.shape == (5, 3, 224, 224)
    assert (images.dtype, target.dtype) == (torch.float32, torch.int64)


def test_every_kind_of_image_file_becomes_rgb_as_pillow_converts_it(root):
    place = root / "val" / "one"
    shutil.rmtree(place)
    place.mkdir()
    picture = digit_image(1, 3, (32, 32))
    picture.convert("L").save(place / "a-gray.jpg")
    picture.convert("CMYK").save(place / "b-cmyk.jpg")
    picture.convert("P").save(place / "c-palette.png")
    picture.convert("RGBA").save(place / "d-alpha.png")
    picture.convert("LA").save(place / "e-gray-alpha.png")
    picture.convert("1").save(place / "f-bilevel.png")
    picture.save(place / "g-really-a-png.jpg", format="PNG")
    picture.save(place / "h.webp", lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(place / "i-turned.jpg", exif=turned)

    data = open_folder(root)
    images, _, target = data.sample_images(15)
    images, paths = images[target == 0], sorted(place.iterdir())
    assert len(images) == len(paths) == 9
    for image, path in zip(images, paths, strict=True):
        with Image.open(path) as stored:
            pixels = v2.functional.pil_to_tensor(stored.convert("RGB"))
        pixels = v2.functional.center_crop(v2.functional.resize(pixels, [37]), [32, 32])
        expected = v2.functional.normalize(pixels.float() / 255, *IMAGENET)
        assert torch.allclose(image, expected, atol=1e-5), path.name


def test_the_test_images_may_lie_in_test_instead_of_val(root):
    expected = list(open_folder(root).test_batches())
    (root / "val").rename(root / "test")
    data = open_folder(root)
    assert data.description()["split"] == "the folders train and test"
    assert_same_batches(data.test_batches(), expected)


def test_sample_images_are_test_images_of_differing_classes(root):
    data = open_folder(root)
    images, originals, target = data.sample_images(4)
    assert target.tolist() == [0, 1, 2, 0]
    assert (originals.dtype, originals.shape) == (torch.uint8, (4, 3, 32, 32))
    test, _ = all_batches(data.test_batches())
    assert torch.equal(images, test[[0, 3, 6, 1]])
    expected = v2.functional.normalize(originals.float() / 255, *IMAGENET)
    assert torch.allclose(images, expected, atol=1e-5)


def test_description_is_plain_json(root):
    description = open_folder(root).description()
    assert json.loads(json.dumps(description)) == description
    assert description["source"] == str(root)
    assert description["augment"] == "imagenet"


# What is left out, and how many are left


def test_hidden_folders_and_files_are_skipped_and_named(root):
    expected = list(open_folder(root).train_batches(0))
    for place in ("train/.ipynb_checkpoints", "train/one/.thumbnails", "val/.git"):
        (root / place).mkdir()
        digit_image(1, 9).save(root / place / "0-checkpoint.jpg")
    digit_image(1, 9).save(root / "train" / "two" / ".thumb.jpg")
    (root / "val" / "two" / "._0.jpg").write_bytes(b"\0\5\x16\7 as macOS adds to archives")
    (root / "val" / "two" / "Thumbs.db").write_bytes(b"as Windows leaves behind")
    data = open_folder(root)
    assert data.classes == CLASSES
    assert (data.train_size, data.test_size) == (18, 9)
    assert_same_batches(data.train_batches(0), expected)
    assert len(list(data.test_batches())) == 2
    assert data.notes[1] == (
        "skipped, because hidden: train/.ipynb_checkpoints, train/one/.thumbnails, "
        "train/two/.thumb.jpg and 2 more"
    )


def test_classes_and_their_images_are_counted(root):
    (root / "val" / "two" / "0.jpg").unlink()
    [note] = open_folder(root).notes
    assert note == "3 classes, training + test images: one 6 + 3, seven 6 + 3, two 6 + 2"
    for split in ("train", "val"):
        for number in range(8):
            shutil.copytree(root / split / "two", root / split / f"two-{number}")
    (root / "train" / "one" / "0.jpg").unlink()
    [note] = open_folder(root).notes
    assert note == "11 classes of 5 to 6 training and 2 to 3 test images each"


def test_training_says_how_many_there_are_and_what_it_skips(root, tmp_path, capsys):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "one" / "extra.gif").write_bytes(b"GIF89a")
    options = [f"--data={root}", "--dataset=imagefolder", "--batch-size=6", "--workers=0"]
    small = ["--image-size=32", "--epochs=1", "--warmup-epochs=0", "--device=cpu", "--dry-run"]
    assert main(["train", *options, *small, f"--run-dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "note: 3 classes, training + test images: one 6 + 3, seven 6 + 3, two 6 + 3\n" in out
    assert "note: skipped, because hidden: train/.ipynb_checkpoints\n" in out
    assert "note: 1 file in train is not read, being .gif\n" in out


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.gif", "b.GIF", "notes.txt"], r"it has 2 files ending in '.gif', and only \.jpg, .* "
         r"are read; convert or rename them$"),
        (["a"], "it has 1 file without an ending, and only"),
        ([".a.jpg"], "all that is in it is hidden$"),
        ([], "it is empty$"),
    ],
)  # fmt: skip
def test_a_class_without_images_says_what_it_holds_instead(root, names, reason):
    shutil.rmtree(root / "train" / "one")
    (root / "train" / "one").mkdir()
    for name in names:
        (root / "train" / "one" / name).write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=f"no image in class folder '.*train/one': {reason}"):
        open_folder(root)


# Repeatability


@pytest.mark.parametrize("augment", list(Augment))
def test_batches_do_not_depend_on_workers_or_on_the_global_generator(root, augment):
    alone = open_folder(root, augment=augment)
    expected = list(alone.train_batches(3))
    torch.manual_seed(99)
    helped = open_folder(root, augment=augment, workers=2)
    before = torch.get_rng_state()
    assert_same_batches(helped.train_batches(3), expected)
    assert_same_batches(alone.train_batches(3), expected)
    assert torch.equal(before, torch.get_rng_state())


def test_test_batches_do_not_depend_on_workers(root):
    assert_same_batches(
        open_folder(root, workers=2).test_batches(), open_folder(root).test_batches()
    )


def test_an_epoch_entered_in_the_middle_goes_on_and_decodes_nothing_before(root, monkeypatch):
    data = open_folder(root)
    whole = list(data.train_batches(1))
    opened = []

    def counting(path):
        opened.append(path)
        return decode(path)

    monkeypatch.setattr(images_module, "decode", counting)
    assert_same_batches(data.train_batches(1, start=2), whole[2:])
    assert len(opened) == 5
    assert list(data.train_batches(1, start=3)) == []


def test_an_images_augmentation_depends_on_seed_epoch_and_image_only(root):
    def augmented(seed, epoch, batch_size=18):
        data = open_folder(root, seed=seed, batch_size=batch_size)
        images, _ = all_batches(data.train_batches(epoch))
        return images[data._epoch_order(epoch).argsort()]

    first = augmented(0, 0)
    assert torch.equal(first, augmented(0, 0, batch_size=6))
    assert not torch.equal(first, augmented(0, 1))
    assert not torch.equal(first, augmented(1, 0))


def test_each_image_of_an_epoch_is_cropped_in_its_own_way(root):
    for path in (root / "train").glob("*/*.jpg"):
        digit_image(1, 0).save(path)
    images, _ = all_batches(open_folder(root, batch_size=18).train_batches(0))
    assert len(torch.unique(images.flatten(1), dim=0)) == 18


# Refusals


def test_no_folder_given_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="`data=DIR`"):
        load_data(RunConfig(dataset=DatasetName.IMAGEFOLDER))


def test_a_folder_cannot_be_downloaded(root):
    config = RunConfig(dataset=DatasetName.IMAGEFOLDER, data=str(root))
    with pytest.raises(ConfigurationError, match="cannot be downloaded"):
        fetch_data(config)


def test_a_batch_larger_than_the_training_set_is_a_configuration_error(root):
    with pytest.raises(ConfigurationError, match=r"batch_size is 19.*18 training images"):
        open_folder(root, batch_size=19)


def remove_all_but_one_class(root):
    for name in CLASSES[1:]:
        shutil.rmtree(root / "train" / name)


def empty_a_class(root):
    shutil.rmtree(root / "train" / "one")
    (root / "train" / "one").mkdir()
    (root / "train" / "one" / "readme.txt").write_text("")


def empty(root):
    shutil.rmtree(root)
    root.mkdir()


SPOILED = {
    "no folder": (shutil.rmtree, "no folder 'train'"),
    "empty folder": (empty, "no folder 'train'"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "no folder 'train'"),
    "no val": (lambda root: shutil.rmtree(root / "val"), r"no folder 'val' \(or 'test'\)"),
    "no classes": (lambda root: empty(root / "train"), "at least 2 class folders.*train"),
    "one class": (remove_all_but_one_class, "at least 2 class folders.*train'.*one"),
    "empty class": (empty_a_class, "no image in class folder '.*train/one'"),
    "empty test class": (lambda root: empty(root / "val" / "two"), "no image.*val/two'"),
    "class missing": (lambda root: shutil.rmtree(root / "val" / "two"), "differ: 'two' is in one"),
    "class extra": (
        lambda root: shutil.copytree(root / "val" / "two", root / "val" / "x\n\x1b[1m"),
        r"differ: 'x\\n\\x1b\[1m' is in one",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_incomplete_folder_is_one_line_that_names_the_place(root, case):
    spoil, expected = SPOILED[case]
    spoil(root)
    with pytest.raises(DataError, match=expected) as caught:
        open_folder(root)
    assert str(root) in one_line(caught)


def png_chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def huge_png():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


def encoded(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def broken_png():
    content = bytearray(encoded(digit_image(1, 0), "PNG"))
    content[60:90] = bytes(30)
    return bytes(content)


BAD_IMAGES = {
    "empty": lambda: b"",
    "text": lambda: b"<html>not found</html>",
    "truncated": lambda: encoded(digit_image(1, 0), "JPEG")[:-200],
    "broken png": broken_png,
    "bomb": huge_png,
    "narrow": lambda: encoded(Image.new("L", (1, 101)), "PNG"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_one_line_that_names_its_file(root, kind, workers):
    for split in ("train", "val"):
        (root / split / "seven" / "1.jpg").write_bytes(BAD_IMAGES[kind]())
    data = open_folder(root, workers=workers, batch_size=18)
    with pytest.raises(DataError, match=r"cannot read image .*train/seven/1.jpg") as caught:
        list(data.train_batches(0))
    one_line(caught)
    if workers == 0:
        with pytest.raises(DataError, match=r"val/seven/1.jpg"):
            list(data.test_batches())
        with pytest.raises(DataError, match=r"val/seven/1.jpg"):
            data.sample_images(9)


def test_postscript_is_refused_unopened_because_pillow_would_run_ghostscript(tmp_path):
    (tmp_path / "image.jpg").write_bytes(encoded(digit_image(1, 0), "EPS"))
    with pytest.raises(DataError, match="not an image of a known format"):
        decode(str(tmp_path / "image.jpg"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_while_training_is_named(root, workers):
    data = open_folder(root, workers=workers, batch_size=18)
    (root / "train" / "one" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"train/one/0.jpg.*No such file"):
        list(data.train_batches(0))


def test_a_pipe_in_an_images_place_does_not_hang(root):
    (root / "train" / "one" / "0.jpg").unlink()
    os.mkfifo(root / "train" / "one" / "0.jpg")
    with pytest.raises(DataError, match=r"0.jpg.*not a plain file"):
        list(open_folder(root, batch_size=18).train_batches(0))


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs forked workers")
def test_a_killed_worker_is_one_line(root, monkeypatch):
    monkeypatch.setattr(images_module, "decode", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="image loading process died") as caught:
        list(open_folder(root, workers=1).train_batches(0))
    one_line(caught)


# Links and names


@pytest.mark.parametrize("place", ["train", "train/one", "train/one/more", "val/two/0.jpg"])
def test_a_link_out_of_the_data_folder_is_refused(root, tmp_path, place):
    outside = tmp_path / "outside"
    if (root / place).exists():
        (root / place).rename(outside)
    else:
        outside.mkdir()
    (root / place).symlink_to(outside)
    with pytest.raises(DataError, match=f"{place}' is a link that leaves the data folder"):
        open_folder(root)


def test_links_inside_the_data_folder_and_to_it_are_followed(root, tmp_path):
    expected = list(open_folder(root).test_batches())
    (root / "val" / "two").rename(root / "elsewhere")
    (root / "val" / "two").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "0.jpg").rename(root / "image.jpg")
    (root / "elsewhere" / "0.jpg").symlink_to("../image.jpg")
    (tmp_path / "link").symlink_to(root)
    assert_same_batches(open_folder(tmp_path / "link").test_batches(), expected)


def test_a_circle_of_links_ends(root):
    (root / "train" / "one" / "again").symlink_to(root / "train")
    with pytest.raises(DataError, match="again', below a class, is a link to a folder"):
        open_folder(root)


def test_class_names_are_taken_as_they_are_and_undecodable_ones_made_readable(root):
    for split in ("train", "val"):
        (root / split / "one").rename(root / split / "<b>\x1b[31m")
        (root / split / "two").rename(os.fsdecode(os.fsencode(root / split) + b"/\xff"))
    data = open_folder(root)
    assert data.classes == ("<b>\x1b[31m", "seven", "\ufffd")
    json.dumps(data.description(), ensure_ascii=False).encode()
    assert len(list(data.test_batches())) == 2
