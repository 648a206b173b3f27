"""What pixels become of files that are not plain 8-bit photographs, and which are refused."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pgt_diag.config import DatasetName, RunConfig
from pgt_diag.data import decoding, load_data
from pgt_diag.data.folder import FolderData
from pgt_diag.data.images import decode
from pgt_diag.distributed import ALL
from pgt_diag.errors import DataError

ROOT = Path(__file__).parent.parent
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


def tiff(bits, values, endian="<", sample_format=1):
    """Return an uncompressed gray TIFF file of 64 × 64 pixels."""
    tags = [(256, 64), (257, 64), (258, bits), (259, 1), (262, 1), (273, 134), (277, 1), (278, 64)]
    tags += [(279, len(values)), (339, sample_format)]
    header = struct.pack(f"{endian}2sHIH", b"II" if endian == "<" else b"MM", 42, 8, len(tags))
    entries = b"".join(struct.pack(f"{endian}HHII", tag, 4, 1, value) for tag, value in tags)
    return header + entries + struct.pack(f"{endian}I", 0) + values


def pgm(values, white=65535):
    return f"P5 64 64 {white}\n".encode() + values.astype(">u2").tobytes()


def packed(values):
    """Return 12-bit values, two in three bytes."""
    even, odd = values.flatten()[::2].astype(int), values.flatten()[1::2].astype(int)
    triples = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=1)
    return triples.astype(np.uint8).tobytes()


def saved(path, array):
    Image.fromarray(array).save(path)
    return path.read_bytes()


SIXTEEN_BITS = {
    "a.png": lambda path: saved(path, RAMP),
    "a.tif": lambda path: saved(path, RAMP),
    "big-endian.tiff": lambda _: tiff(16, RAMP.astype(">u2").tobytes(), ">"),
    "a.pgm": lambda _: pgm(RAMP),
    "ascii.pgm": lambda _: b"P2 64 64 65535\n" + b" ".join(b"%d" % x for x in RAMP.flatten()),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_scaled_by_a_257th(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(SIXTEEN_BITS[name](path))
    image = decode(str(path))
    assert image.mode == "RGB"
    expected = np.rint(RAMP / 257)
    for channel in np.moveaxis(np.asarray(image), 2, 0):
        assert np.array_equal(channel, expected)
    assert np.asarray(image).mean() == pytest.approx(RAMP.mean() / 257, abs=0.01)


def test_twelve_bits_reach_from_black_to_white(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(12, packed(RAMP >> 4)))
    (tmp_path / "a.pgm").write_bytes(pgm(RAMP >> 4, white=4095))
    for name in ("a.tif", "a.pgm"):
        pixels = np.asarray(decode(str(tmp_path / name)))[..., 0]
        assert np.abs(pixels - (RAMP >> 4) * (255 / 4095)).max() <= 0.51, name


def test_sixteen_bits_of_each_colour_keep_their_brightness(tmp_path):
    values = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    body = values.astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6 64 64 65535\n" + body)
    pixels = np.asarray(decode(str(tmp_path / "a.ppm")))
    assert np.abs(pixels - values / 257).max() <= 1


REFUSED = {
    "float.tif": (lambda path: saved(path, (RAMP / 65535).astype(np.float32)), "floating-point"),
    "int.tif": (lambda path: saved(path, RAMP.astype(np.int32)), "32-bit or signed integers"),
    "signed.tif": (lambda _: tiff(16, (RAMP >> 1).tobytes(), sample_format=2), "signed integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pixels_of_no_known_range_are_refused_by_name(name, tmp_path):
    make, kind = REFUSED[name]
    (tmp_path / name).write_bytes(make(tmp_path / name))
    with pytest.raises(DataError, match=rf"{name}': its pixels are .*{kind}.* 8 or 16 bits"):
        decode(str(tmp_path / name))


@pytest.fixture
def two_brightnesses(tmp_path):
    """A folder of two classes: gray of about 20,000 and 45,000 of 65,535, under noise."""
    dice = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, level in (("dark", 20_000), ("light", 45_000)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                values = dice.normal(level, 2_000, (40, 40)).astype(np.uint16)
                Image.fromarray(values).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("where", ["here", "in workers", "beside a decoder of JPEGs"])
def test_classes_told_apart_by_sixteen_bit_brightness_stay_apart(two_brightnesses, where):
    config = RunConfig(
        dataset=DatasetName.IMAGEFOLDER,
        data=str(two_brightnesses),
        batch_size=4,
        image_size=16,
        workers=2 if where == "in workers" else 0,
        decode="gpu" if "JPEG" in where else "cpu",
    )
    data = FolderData(config, torch.device("cpu"), ALL)
    images, targets = (torch.cat(parts) for parts in zip(*data.test_batches(), strict=True))
    data.close()
    levels = (images * data._std + data._mean).mean((1, 2, 3))
    for label, level in enumerate((20_000, 45_000)):
        assert levels[targets == label] == pytest.approx(level / 257, abs=2)
    assert decoding.Encoded  # the decoder was imported, and has left these to Pillow


def test_of_an_animated_image_the_first_picture_is_taken(tmp_path):
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    for name, options in {
        "gif.jpg": {"format": "GIF"},  # as found on the web: the name lies
        "a.webp": {"lossless": True},
        "a.png": {},
        "a.tif": {},
    }.items():
        more = {"save_all": True, "append_images": pictures[1:], **options}
        pictures[0].save(tmp_path / name, **more)
        assert np.asarray(decode(str(tmp_path / name)))[4, 4].tolist() == [255, 0, 0], name


WARNED = """
import sys, warnings
from PIL import Image
from pgt_diag.data.images import decode
warnings.warn_explicit("somebody else's", UserWarning, "theirs.py", 1)
Image.MAX_IMAGE_PIXELS = 10  # warns from there, and refuses from twice as much
decode(sys.argv[1])
"""


def test_what_pillow_warns_of_does_not_come_between_the_lines(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for options in ([], ["-W", "default"], ["-W", "always"]):
        result = subprocess.run(
            [sys.executable, *options, "-c", WARNED, str(tmp_path / "a.png")],
            capture_output=True, text=True, cwd=ROOT, check=True,
        )  # fmt: skip
        assert "somebody else's" in result.stderr
        assert "PIL" not in result.stderr
        assert "Decompression" not in result.stderr


def test_an_image_too_huge_to_decode_is_named(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / split / name / "0.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "b" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 12)
    config = RunConfig(
        dataset=DatasetName.IMAGEFOLDER,
        data=str(tmp_path),
        batch_size=2,
        image_size=8,
        workers=0,
    )
    with pytest.raises(DataError, match=r"b/0.png': Image size \(400 pixels\) exceeds"):
        list(load_data(config).train_batches(0))
