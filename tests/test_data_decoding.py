"""`decode` gpu: the same parts of the same images, decoded in batches on the training device.

torchvision decodes lists of JPEGs on a CPU as well, so that all but its CUDA decoder runs here.
"""

import dataclasses
import importlib.util
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from commands.train import _agreed
from pgt_diag.config import Augment, BadImages, DatasetName, Decode, RunConfig
from pgt_diag.data import decoding, load_data
from pgt_diag.data.base import BadImage
from pgt_diag.data.folder import IMAGENET_STD, FolderData
from pgt_diag.data.images import read_jpeg
from pgt_diag.data.streams import ahead
from pgt_diag.distributed import ALL, Shard
from pgt_diag.errors import ConfigurationError, DataError

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning")

ROOT = Path(__file__).parent.parent
CLASSES = ("cat", "dog")
PER_CLASS = {"train": 9, "val": 5}
CPU = torch.device("cpu")


def photograph(number, size=(72, 60)):
    """Return a piece of a photograph, another for each number."""
    picture = Image.fromarray(load_sample_images().images[number % 2])
    left, top = 23 * number % 400, 17 * number % 250
    return picture.crop((left, top, left + 2 * size[0], top + 2 * size[1])).resize(size)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Photographs of two classes: mostly JPEG files of all kinds, some of other formats."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            place = root / split / name
            place.mkdir(parents=True)
            for number in range(count):
                photograph(10 * label + number, (70 + number, 60)).save(place / f"{number}.jpg")
            turned = Image.Exif()
            turned[0x0112] = 6
            photograph(1).save(place / "0.jpg", progressive=True)
            photograph(2).convert("L").save(place / "1.jpg", exif=turned)
            photograph(3).convert("CMYK").save(place / "2.jpg")
            photograph(4).save(place / "3.jpg", format="PNG")
            (place / "4.jpg").unlink()
            photograph(5).convert("P").save(place / "4.png")
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data")


def open_folder(root, decode=Decode.GPU, device=CPU, shard=ALL, **options):
    options = {"batch_size": 6, "image_size": 32, "workers": 0, **options}
    config = RunConfig(dataset=DatasetName.IMAGEFOLDER, data=str(root), decode=decode, **options)
    return FolderData(config, device, shard)


def assert_same(one, two):
    one, two = list(one), list(two)
    assert len(one) == len(two)
    for (images, target), (images_two, target_two) in zip(one, two, strict=True):
        assert torch.equal(images, images_two)
        assert torch.equal(target, target_two)


def assert_close(one, two, *, most, mean):
    """Whether pixels differ by no more than so many gray levels."""
    levels = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    one, two = list(one), list(two)
    assert len(one) == len(two)
    for (images, target), (images_two, target_two) in zip(one, two, strict=True):
        assert torch.equal(target.cpu(), target_two)
        difference = (images.cpu() - images_two).abs() * levels
        assert difference.max() <= most
        assert difference.mean() <= mean


@pytest.mark.parametrize("augment", [Augment.IMAGENET, Augment.SMALL, Augment.NONE])
def test_crops_and_flips_are_those_of_the_other_way(root, augment):
    data = open_folder(root, augment=augment)
    usual = open_folder(root, Decode.CPU, augment=augment)
    for epoch in (0, 3):
        expected = list(usual.train_batches(epoch))
        assert_close(data.train_batches(epoch), expected, most=2.01, mean=0.1)
    assert_close(data.test_batches(), usual.test_batches(), most=2.01, mean=0.1)
    for ours, theirs in zip(data.sample_images(4), usual.sample_images(4), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_the_same_again_and_from_its_middle(root, workers):
    first = open_folder(root)
    whole = list(first.train_batches(1))
    before = torch.get_rng_state()
    data = open_folder(root, workers=workers)
    assert_same(data.train_batches(1), whole)
    assert_same(data.train_batches(1, start=2), whole[2:])
    assert_same(data.test_batches(), first.test_batches())
    data.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_asked_for_while_others_are_made_mix_nothing_up(root):
    data = open_folder(root)
    expected = [list(data.train_batches(epoch)) for epoch in (0, 1)]
    one, two = zip(*zip(data.train_batches(0), data.train_batches(1), strict=True), strict=True)
    assert_same(one, expected[0])
    assert_same(two, expected[1])


def test_processes_share_the_batches(root):
    whole = list(open_folder(root, batch_size=5).train_batches(2))
    shares = [open_folder(root, batch_size=5, shard=Shard(rank, 2)) for rank in range(2)]
    parts = zip(*(share.train_batches(2) for share in shares), strict=True)
    together = [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]
    assert_same(together, whole)


def test_the_size_of_what_is_decoded_at_a_time_changes_nothing(root, monkeypatch):
    data = open_folder(root)
    expected = list(data.train_batches(0))
    sizes = []
    decode = data._decoder._decode
    data._decoder._decode = lambda contents: sizes.append(len(contents)) or decode(contents)
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 2 * 3 * 75 * 60)
    assert_same(data.train_batches(0), expected)
    assert max(sizes) == 2
    sizes.clear()
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)
    assert_same(data.train_batches(0), expected)
    assert set(sizes) == {1}


# What is decoded where


def test_only_jpegs_that_all_decoders_read_alike_are_decoded_there(tmp_path):
    def taken(name, **options):
        picture = options.pop("picture", photograph(7))
        picture.save(tmp_path / name, **options)
        return read_jpeg(str(tmp_path / name))

    for name, options in {
        "plain.jpg": {},
        "gray.jpg": {"picture": photograph(7).convert("L")},
        "progressive.jpg": {"progressive": True},
        "whole.jpeg": {"subsampling": 0, "quality": 100},
        "jpeg.png": {"format": "JPEG"},
    }.items():
        jpeg = taken(name, **options)
        assert jpeg is not None, name
        assert jpeg.content.tolist() == list((tmp_path / name).read_bytes())
        assert jpeg.size == (72, 60)
    for name, options in {
        "cmyk.jpg": {"picture": photograph(7).convert("CMYK")},
        "rgb.jpg": {"keep_rgb": True},
        "png.jpg": {"format": "PNG"},
        "several.jpg": {"format": "MPO", "save_all": True, "append_images": [photograph(8)]},
        "narrow.jpg": {"picture": Image.new("L", (1, 101))},
    }.items():
        assert taken(name, **options) is None, name

    whole = (tmp_path / "plain.jpg").read_bytes()
    for name, content in {
        "cut.jpg": whole[:-200],
        "empty.jpg": b"",
        "swollen.jpg": whole + bytes(2 << 20),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_jpeg(str(tmp_path / name)) is None, name
    assert read_jpeg(str(tmp_path / "missing.jpg")) is None
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read_jpeg(str(tmp_path / "pipe.jpg")) is None


def test_what_the_decoder_refuses_or_reads_otherwise_is_read_the_usual_way(root):
    data = open_folder(root)
    expected = list(data.train_batches(0))
    decode = data._decoder._decode
    calls = itertools.count()

    def moody(contents):
        if len(contents) > 1 or next(calls) % 2:
            raise RuntimeError("Error while decoding JPEG images")
        return [image[:, :-1] for image in decode(contents)]

    data._decoder._decode = moody
    assert_close(data.train_batches(0), expected, most=2.01, mean=0.1)
    assert data.bad_images == ()
    assert next(calls) > 10


# Bad images


def spoil_tables(path):
    """Damage what Pillow's look at the header does not see: the Huffman tables."""
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc4") + 5
    content[place : place + 16] = bytes([255] * 16)
    path.write_bytes(content)
    assert read_jpeg(str(path)) is not None


@pytest.fixture
def spoilt(root):
    (root / "train" / "cat" / "5.jpg").write_bytes(b"")
    cut = root / "train" / "cat" / "6.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    spoil_tables(root / "train" / "dog" / "5.jpg")
    (root / "train" / "dog" / "7.jpg").unlink()
    os.mkfifo(root / "train" / "dog" / "7.jpg")
    spoil_tables(root / "val" / "dog" / "0.jpg")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_recorded_as_ever(spoilt, workers):
    options = {"bad_images": BadImages.SKIP, "batch_size": 18}
    data = open_folder(spoilt, workers=workers, **options)
    usual = open_folder(spoilt, Decode.CPU, **options)
    assert_close(data.train_batches(0), usual.train_batches(0), most=2.01, mean=0.1)
    assert_close(data.test_batches(), usual.test_batches(), most=2.01, mean=0.1)
    data.close()
    assert data.bad_images == usual.bad_images
    assert [bad.path for bad in data.bad_images] == [
        *("train/cat/5.jpg", "train/cat/6.jpg", "train/dog/5.jpg", "train/dog/7.jpg"),
        "val/dog/0.jpg",
    ]
    assert BadImage("train/dog/7.jpg", "train/dog/8.jpg", "not a plain file") in data.bad_images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["cat/5.jpg", "dog/5.jpg"])
def test_by_default_a_bad_image_ends_the_run_with_its_name(root, name, workers):
    if name.startswith("cat"):
        (root / "train" / name).write_bytes(b"no image")
    else:
        spoil_tables(root / "train" / name)
    data = open_folder(root, workers=workers, batch_size=18)
    with pytest.raises(
        DataError, match=rf"^cannot read image .*train/{name}': .*`bad_images=\"skip\"`$"
    ):
        list(data.train_batches(0))
    data.close()
    assert data.bad_images == ()


# Ahead


def test_the_next_is_made_while_one_is_used_and_no_more():
    asked, used = [], []
    made = threading.Semaphore(0)

    def make(item):
        asked.append(item)
        made.release()
        return 10 * item

    for value in ahead(make, range(4)):
        used.append(value)
        for _ in range(2 if len(used) == 1 else int(len(used) < 4)):
            assert made.acquire(timeout=60)
        assert asked == list(range(min(len(used) + 1, 4)))
    assert used == [0, 10, 20, 30]
    assert list(ahead(make, [])) == []


def test_an_error_comes_in_its_turn():
    batches = ahead(lambda item: 6 // item, [3, 2, 0, 1])
    assert [next(batches), next(batches)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_abandoned_batches_leave_no_thread(root):
    before = set(threading.enumerate())
    batches = open_folder(root).train_batches(0)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert set(threading.enumerate()) <= before


# Where it cannot be


def test_without_a_gpu_it_is_one_line(root):
    config = RunConfig(dataset=DatasetName.IMAGEFOLDER, data=str(root), decode="gpu")
    with pytest.raises(ConfigurationError, match=r"^decode is gpu, .* cpu: it needs a CUDA GPU"):
        load_data(config)


def test_without_any_decoder_it_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("not compiled with nvJPEG support\nmore")

    monkeypatch.setattr("torchvision.io.decode_jpeg", fail)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(
        ConfigurationError,
        match=r"(torchvision: not compiled .* support; torchcodec: .*); install .* cpu$",
    ):
        decoding.BatchDecoder(CPU, 8, lambda *_: None)


# Which decoder


def decode_as_torchcodec(source, *, mode, device):
    """Decode JPEGs as torchcodec 0.16 to 0.17 does on a CPU: turned as EXIF says."""
    assert (mode, str(device)) == ("RGB", "cpu")
    images = []
    for content in source:
        assert content.dtype == torch.uint8
        try:
            with Image.open(io.BytesIO(content.numpy().tobytes())) as stored:
                image = ImageOps.exif_transpose(stored).convert("RGB")
        except OSError as error:
            raise RuntimeError(f"DecodeJpeg.cpp:208, {error}") from None
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return images


@pytest.fixture
def torchcodec(monkeypatch):
    """A torchvision that decodes nothing any more, and a torchcodec, if it is not there."""
    for name in ("decode_jpeg", "ImageReadMode"):
        monkeypatch.delattr(f"torchvision.io.{name}")
    if importlib.util.find_spec("torchcodec") is None:
        package, module = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
        module.decode_jpeg = decode_as_torchcodec
        monkeypatch.setitem(sys.modules, "torchcodec", package)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


def test_torchcodec_takes_over_from_torchvision(torchcodec, root):
    data, usual = open_folder(root), open_folder(root, Decode.CPU)
    assert_close(data.train_batches(0), usual.train_batches(0), most=2.01, mean=0.1)
    assert_close(data.test_batches(), usual.test_batches(), most=2.01, mean=0.1)


def test_torchcodec_leaves_bad_images_to_the_usual_way(torchcodec, spoilt):
    options = {"bad_images": BadImages.SKIP, "batch_size": 18}
    data, usual = open_folder(spoilt, **options), open_folder(spoilt, Decode.CPU, **options)
    assert_close(data.train_batches(0), usual.train_batches(0), most=2.01, mean=0.1)
    assert_close(data.test_batches(), usual.test_batches(), most=2.01, mean=0.1)
    assert data.bad_images == usual.bad_images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_decoder_turns_an_image(torchcodec, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(3, (64, 64)).save(tmp_path / "a.jpg", exif=exif)
    content = read_jpeg(str(tmp_path / "a.jpg")).content
    [image] = decoding._decoder(CPU)([content])
    with Image.open(tmp_path / "a.jpg") as stored:
        expected = torch.from_numpy(np.array(stored)).permute(2, 0, 1)
    assert (image.int() - expected.int()).abs().max() <= 2


DECODED = """
import sys
from tests.test_data_decoding import open_folder
list(open_folder(sys.argv[1], workers=2).train_batches(0))
"""


def test_no_deprecation_is_told_to_a_user(root):
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", DECODED, str(root)],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert "TorchCodec" not in result.stderr


def test_a_run_goes_on_only_the_way_it_began():
    config = RunConfig(dataset=DatasetName.IMAGEFOLDER, data="anywhere")
    asked = dataclasses.replace(config, decode=Decode.GPU)
    with pytest.raises(ConfigurationError, match=r"^decode is gpu, and cpu in the run that"):
        _agreed(SimpleNamespace(config=config), asked, {"decode": Decode.GPU})


@pytest.mark.parametrize("decode", list(Decode))
def test_the_description_says_where_images_were_decoded(root, decode):
    assert open_folder(root, decode).description()["decode"] == decode.value


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_cuda_decoder_sees_the_same_to_a_few_gray_levels(spoilt, workers):
    cuda = torch.device("cuda")
    options = {"bad_images": BadImages.SKIP, "batch_size": 9, "image_size": 48}
    data = open_folder(spoilt, device=cuda, workers=workers, **options)
    usual = open_folder(spoilt, Decode.CPU, **options)
    for epoch in range(3):
        whole = list(data.train_batches(epoch))
        # Chroma is interpolated by another rule, which edges of colours show.
        assert_close(whole, usual.train_batches(epoch), most=64, mean=3)
        assert_same(data.train_batches(epoch, start=1), whole[1:])
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in whole)
    assert_close(data.test_batches(), usual.test_batches(), most=64, mean=3)
    data.close()
    assert data.bad_images == usual.bad_images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_decoder_leaves_alone_what_the_gpu_still_reads(root):
    cuda = torch.device("cuda")
    expected = list(open_folder(root, device=cuda).train_batches(0))
    data = open_folder(root, device=cuda)
    busy = torch.randn(4096, 4096, device=cuda)
    sums = []
    for _ in range(20):
        for images, _ in data.train_batches(0):
            for _ in range(5):
                busy = (busy @ busy).clamp_(-1, 1)
            sums.append(images.double().sum())  # queued behind what takes its time
            del images
    wanted = [images.double().sum() for images, _ in expected] * 20
    assert torch.equal(torch.stack(sums), torch.stack(wanted))
