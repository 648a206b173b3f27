"""Data sets in memory: what they hold, how they are batched, augmented and refused."""

import gzip
import hashlib
import json
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F

from commands.app import main
from pgt_diag import preflight
from pgt_diag.config import Augment, DatasetName, RunConfig
from pgt_diag.data import fetch_data, load_data
from pgt_diag.errors import ConfigurationError, DataError


def open_set(dataset, *, download=False, **options):
    options = {"batch_size": 64, **options}
    config = RunConfig(dataset=DatasetName(dataset), **options)
    if download:
        fetch_data(config)
    return load_data(config)


def write_idx(path, array):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, *, suffix=".gz", train=100, test=30, size=28):
    """Write a small Fashion-MNIST of random images; returns its four arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = []
    for prefix, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, size, size))
        labels = np.arange(count) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        arrays += [images, labels]
    return arrays


@pytest.fixture
def fashion(tmp_path):
    write_fashion(tmp_path)
    return tmp_path


def all_batches(batches):
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def gray_levels(data, images):
    """Undo the normalisation: uint8 again, from float32 images."""
    description = data.description()
    mean, std = (torch.tensor(description[key]).view(3, 1, 1) for key in ("mean", "std"))
    levels = (images * std + mean) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    return levels.round().to(torch.uint8)


# What the sets hold


def test_digits_are_scikit_learns_split_by_class_the_same_for_every_seed():
    from sklearn.datasets import load_digits

    data, other = open_set("digits", seed=0), open_set("digits", seed=9)
    assert (data.train_size, data.test_size, data.image_size) == (1438, 359, 8)
    assert data.classes == tuple("0123456789")

    images, target = all_batches(data.test_batches())
    assert torch.equal(images, all_batches(other.test_batches())[0])
    counts = torch.bincount(target)
    assert counts.min() >= 35
    assert counts.max() <= 37

    everything = {
        (image.astype(int) * 255 / 16).round().astype(np.uint8).tobytes(): label
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    for level, label in zip(gray_levels(data, images)[:, 0], target, strict=True):
        assert everything[level.numpy().tobytes()] == label


def test_train_and_test_images_make_up_the_whole_set():
    data = open_set("digits", batch_size=1)
    train, _ = all_batches(data.train_batches(0))
    test, _ = all_batches(data.test_batches())
    seen = torch.cat([train, test])[:, 0].flatten(1)
    assert len(seen) == 1797
    assert len(torch.unique(seen, dim=0)) > 1790


def test_synthetic_images_have_the_asked_for_size_and_can_be_learnt():
    data = open_set("synthetic", synthetic_images=300, synthetic_classes=3, image_size=20)
    images, target = all_batches(data.train_batches(0))
    assert (data.train_size, data.test_size, len(data.classes)) == (300, 75, 3)
    assert images.shape[1:] == (3, 20, 20)
    centres = torch.stack([images[target == label].mean(0).flatten() for label in range(3)])
    test, test_target = all_batches(data.test_batches())
    nearest = torch.cdist(test.flatten(1), centres).argmin(1)
    assert (nearest == test_target).float().mean() > 0.95
    # and is not trivial: no single pixel tells the classes apart
    pixel = images[:, 0, 0, 0]
    assert pixel[target == 0].max() > pixel[target == 1].min()


def test_synthetic_images_are_the_same_in_every_run():
    one, two = (open_set("synthetic", seed=seed) for seed in (0, 1))
    first, second = (all_batches(data.test_batches())[0] for data in (one, two))
    assert torch.equal(first, second)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_either_layout(tmp_path, place, suffix):
    _, _, images, labels = write_fashion(tmp_path / place, suffix=suffix)
    data = open_set("fashion-mnist", data=str(tmp_path), batch_size=7)
    read, target = all_batches(data.test_batches())
    assert np.array_equal(gray_levels(data, read)[:, 0].numpy(), images)
    assert np.array_equal(target.numpy(), labels)
    assert data.classes[9] == "Ankle boot"


def test_fashion_mnist_agrees_with_torchvisions_reader(tmp_path):
    write_fashion(tmp_path / "FashionMNIST" / "raw", suffix="")
    reference = torchvision.datasets.FashionMNIST(tmp_path, train=False)
    data = open_set("fashion-mnist", data=str(tmp_path))
    images, target = all_batches(data.test_batches())
    assert torch.equal(gray_levels(data, images)[:, 0], reference.data)
    assert torch.equal(target, reference.targets)


@pytest.mark.skipif(
    not preflight.DEBIAN_FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist"
)
def test_debians_fashion_mnist_is_found_unasked():
    data = open_set("fashion-mnist")
    assert (data.train_size, data.test_size, data.image_size) == (60_000, 10_000, 28)
    # the figures everybody's tutorials normalise with
    assert data.description()["mean"] == pytest.approx([0.2860] * 3, abs=1e-4)
    assert data.description()["std"] == pytest.approx([0.3530] * 3, abs=1e-4)


# Batches


def test_batches_are_normalised_by_the_training_sets_statistics():
    data = open_set("synthetic", synthetic_images=128)
    images, target = all_batches(data.train_batches(0))
    assert images.dtype == torch.float32
    assert target.dtype == torch.int64
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert images.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-5)

    levels = gray_levels(data, images)
    description = data.description()
    reference = torchvision.transforms.v2.functional.normalize(
        levels / 255, description["mean"], description["std"]
    )
    assert torch.allclose(images, reference, atol=1e-5)


def test_a_constant_image_set_normalises_to_finite_numbers(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.full((100, 28, 28), 7))
    data = open_set("fashion-mnist", data=str(tmp_path))
    for images, _ in [*data.train_batches(0), *data.test_batches()]:
        assert images.isfinite().all()


def test_the_incomplete_last_batch_is_dropped_in_training_and_kept_in_testing():
    data = open_set("digits", batch_size=100)
    train, test = list(data.train_batches(0)), list(data.test_batches())
    assert [len(target) for _, target in train] == [100] * 14
    assert [len(target) for _, target in test] == [100, 100, 100, 59]
    assert data.batches_per_epoch == 14


def test_the_batch_may_be_the_whole_training_set_but_not_more():
    assert open_set("digits", batch_size=1438).batches_per_epoch == 1
    with pytest.raises(ConfigurationError, match=r"batch_size is 1439.*only 1438 training images"):
        open_set("digits", batch_size=1439)


def test_an_epochs_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(seed, epoch):
        return all_batches(open_set("digits", seed=seed).train_batches(epoch))[0]

    first = order(0, 0)
    torch.manual_seed(123)
    assert torch.equal(first, order(0, 0))
    assert not torch.equal(first, order(0, 1))
    assert not torch.equal(first, order(1, 0))


@pytest.mark.parametrize("start", [0, 1, 3, 21, 22, 30])
@pytest.mark.parametrize("augment", [Augment.NONE, Augment.SMALL])
def test_an_epoch_entered_in_the_middle_goes_on_as_if_undisturbed(augment, start):
    data = open_set("digits", augment=augment)
    whole = list(data.train_batches(2))
    rest = list(data.train_batches(2, start=start))
    assert len(rest) == max(0, 22 - start)
    for (images, target), (again, target_again) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(target, target_again)


def test_training_never_draws_from_torchs_global_generator():
    before = torch.get_rng_state()
    data = open_set("synthetic", augment=Augment.SMALL)
    list(data.train_batches(0))
    data.sample_images(3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [12, 32])
def test_a_chosen_image_size_resizes_as_torchvision_does(size):
    native, resized = open_set("digits"), open_set("digits", image_size=size)
    original = gray_levels(native, all_batches(native.test_batches())[0])
    reference = torchvision.transforms.v2.Resize((size, size), antialias=True)(original)
    ours = gray_levels(resized, all_batches(resized.test_batches())[0])
    assert resized.image_size == size
    assert torch.equal(ours, reference)


# Augmentation


def every_crop_and_flip(image, padding):
    """All images the augmentation may make of one, by a plain loop; keyed by their bytes."""
    padded = F.pad(image, (padding,) * 4)
    size = image.shape[-1]
    crops = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + size, left : left + size]
            crops[crop.numpy().tobytes()] = (top, left, False)
            crops[crop.flip(-1).contiguous().numpy().tobytes()] = (top, left, True)
    return crops


@pytest.mark.parametrize(("size", "padding"), [(8, 1), (32, 4)])
def test_small_augmentation_shifts_by_an_eighth_and_flips_every_way_equally_often(size, padding):
    # One random image a thousand times: every draw can then be read off the result.
    data = open_set("synthetic", image_size=size, synthetic_images=2000, augment=Augment.SMALL)
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, size, size), dtype=torch.uint8)
    data._train.copy_(image)
    possible = every_crop_and_flip(image, padding)
    assert len(possible) == 2 * (2 * padding + 1) ** 2

    augmented = gray_levels(data, all_batches(data.train_batches(0))[0])
    draws = [possible[one.contiguous().numpy().tobytes()] for one in augmented]
    top, left, flipped = (torch.tensor(column) for column in zip(*draws, strict=True))
    expected = len(draws) / (2 * padding + 1)
    for shifts in (top, left):
        counts = torch.bincount(shifts, minlength=2 * padding + 1)
        assert (counts - expected).abs().max() < 5 * expected**0.5
    assert 0.44 < flipped.float().mean() < 0.56
    assert torch.corrcoef(torch.stack([top, left, flipped]).float()).triu(1).abs().max() < 0.1


def test_an_images_augmentation_does_not_depend_on_its_batch():
    draws = []
    for batch_size in (10, 64):
        data = open_set("synthetic", augment=Augment.SMALL, batch_size=batch_size)
        order = data._epoch_order(1)
        images, _ = all_batches(data.train_batches(1))
        draws.append(dict(zip(order.tolist(), images, strict=True)))
    shared = draws[0].keys() & draws[1].keys()
    assert len(shared) >= 500
    assert all(torch.equal(draws[0][index], draws[1][index]) for index in shared)


def test_augmentation_changes_from_epoch_to_epoch_and_with_the_seed():
    def augmented(seed, epoch):
        data = open_set("synthetic", augment=Augment.SMALL, seed=seed, batch_size=512)
        images, _ = next(data.train_batches(epoch))
        return images[data._epoch_order(epoch).argsort()]

    assert not torch.equal(augmented(0, 0), augmented(0, 1))
    assert not torch.equal(augmented(0, 0), augmented(1, 0))


def test_auto_augments_fashion_and_leaves_digits_and_synthetic_as_they_are(fashion):
    assert open_set("fashion-mnist", data=str(fashion)).description()["augment"] == "small"
    assert open_set("digits").description()["augment"] == "none"
    assert open_set("synthetic").description()["augment"] == "none"


def test_test_images_are_never_augmented():
    plain, augmented = (open_set("digits", augment=choice) for choice in ("none", "small"))
    for (one, _), (two, _) in zip(plain.test_batches(), augmented.test_batches(), strict=True):
        assert torch.equal(one, two)


def test_imagenet_augmentation_is_refused_for_images_in_memory():
    with pytest.raises(ConfigurationError, match="augment is imagenet and dataset is digits"):
        open_set("digits", augment=Augment.IMAGENET)


# Samples and description


@pytest.mark.parametrize("count", [1, 4, 10, 25])
def test_sample_images_are_of_as_many_classes_as_there_are(count):
    data = open_set("digits")
    images, originals, target = data.sample_images(count)
    assert images.shape == originals.shape == (count, 3, 8, 8)
    assert (images.dtype, originals.dtype) == (torch.float32, torch.uint8)
    assert target.tolist() == [label % 10 for label in range(count)]
    assert torch.equal(gray_levels(data, images), originals)
    for again, reference in zip(
        data.sample_images(count), (images, originals, target), strict=True
    ):
        assert torch.equal(again, reference)

    test, test_target = all_batches(data.test_batches())
    seen = dict.fromkeys(range(10), 0)
    for image, label in zip(images, target.tolist(), strict=True):
        assert torch.equal(image, test[test_target == label][seen[label]])
        seen[label] += 1


def test_more_sample_images_than_test_images_are_refused():
    data = open_set("synthetic", synthetic_images=8, synthetic_classes=2, batch_size=2)
    assert len(data.sample_images(2)[0]) == 2
    with pytest.raises(ConfigurationError, match=r"3 sample images asked for.*2 test images"):
        data.sample_images(3)


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_description_is_plain_json(dataset):
    description = open_set(dataset).description()
    assert json.loads(json.dumps(description)) == description
    assert description["name"] == dataset
    assert len(description["mean"]) == len(description["std"]) == 3


# Refusals


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_a_folder_is_refused_for_a_set_that_reads_none(dataset, tmp_path):
    with pytest.raises(ConfigurationError, match=f"dataset is {dataset}, which reads no folder"):
        open_set(dataset, data=str(tmp_path))


def test_fewer_synthetic_images_than_classes_are_refused():
    with pytest.raises(ConfigurationError, match="synthetic_images is 5, fewer than the 10"):
        open_set("synthetic", synthetic_images=5, batch_size=1)


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist.*`data=DIR`") as caught:
        open_set("fashion-mnist", data=str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "nowhere") in str(caught.value)


def break_gzip_checksum(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


def break_stream(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "header only": lambda path: path.write_bytes(gzip.compress(struct.pack(">II", 0x803, 100))),
    "not gzip": lambda path: path.write_bytes(b"hello" * 100),
    "checksum": break_gzip_checksum,
    "stream": break_stream,
    "huge": lambda path: path.write_bytes(
        gzip.compress(struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28))
    ),
    "floats": lambda path: path.write_bytes(
        gzip.compress(struct.pack(">IIII", 0xD03, 1, 28, 28) + bytes(4 * 784))
    ),
    "too short": lambda path: path.write_bytes(
        gzip.compress(struct.pack(">IIII", 0x803, 2, 28, 28) + bytes(784))
    ),
    "too long": lambda path: path.write_bytes(
        gzip.compress(struct.pack(">IIII", 0x803, 1, 28, 28) + bytes(785))
    ),
    "other count": lambda path: write_idx(path, np.zeros((99, 28, 28))),
    "no images": lambda path: write_idx(path, np.zeros((0, 28, 28))),
    "not square": lambda path: write_idx(path, np.zeros((100, 28, 27))),
    "other size": lambda path: write_idx(path, np.zeros((100, 14, 14))),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("left", [0, 3, 15, 16, -1])
def test_a_cut_idx_file_is_one_line_that_names_it(tmp_path, suffix, left):
    write_fashion(tmp_path, suffix=suffix)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match=rf"^.*{path.name}: .*$"):
        open_set("fashion-mnist", data=str(tmp_path))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_idx_file_is_one_line_that_names_a_file(fashion, damage):
    DAMAGE[damage](fashion / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"-images-idx3-ubyte.gz") as caught:
        open_set("fashion-mnist", data=str(fashion))
    assert "\n" not in str(caught.value)


def test_a_label_beyond_the_classes_is_refused(fashion):
    write_idx(fashion / "t10k-labels-idx1-ubyte.gz", np.full(30, 10))
    with pytest.raises(DataError, match=r"t10k-images.*do not belong together"):
        open_set("fashion-mnist", data=str(fashion))


# CIFAR and downloads


def write_cifar(folder, monkeypatch, *, hundred=False):
    """Write a tiny CIFAR in torchvision's layout, and teach torchvision its checksums."""
    dataset = torchvision.datasets.CIFAR100 if hundred else torchvision.datasets.CIFAR10
    place = folder / dataset.base_folder
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key = "fine_labels" if hundred else "labels"

    def write(name, content):
        (place / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((place / name).read_bytes()).hexdigest()]

    def batch():
        return {
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            key: list(range(10)) * 2,
        }

    train = [write(name, batch()) for name, _ in dataset.train_list]
    test = [write(name, batch()) for name, _ in dataset.test_list]
    names = [f"class {label}" for label in range(100 if hundred else 10)]
    meta = write(dataset.meta["filename"], {dataset.meta["key"]: names})
    monkeypatch.setattr(dataset, "train_list", train)
    monkeypatch.setattr(dataset, "test_list", test)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": meta[1]})
    return dataset, place


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, hundred):
    dataset, _ = write_cifar(tmp_path, monkeypatch, hundred=hundred)
    name = "cifar100" if hundred else "cifar10"
    data = open_set(name, data=str(tmp_path), batch_size=10)
    reference = dataset(tmp_path, train=False)
    images, target = all_batches(data.test_batches())
    assert np.array_equal(gray_levels(data, images).permute(0, 2, 3, 1).numpy(), reference.data)
    assert target.tolist() == reference.targets
    assert data.train_size == (20 if hundred else 100)
    assert len(data.classes) == (100 if hundred else 10)


@pytest.mark.parametrize("left", [0, 100, -1])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cut_cifar_file_is_told_in_one_line(tmp_path, monkeypatch, name, left):
    _, place = write_cifar(tmp_path, monkeypatch)
    (place / name).write_bytes((place / name).read_bytes()[:left])
    with pytest.raises(DataError, match=r"^CIFAR10: no intact copy in .*`download=True`.*$"):
        open_set("cifar10", data=str(tmp_path), batch_size=10)


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_strangers_pickle_is_refused_and_never_executed(tmp_path, monkeypatch, name):
    _, place = write_cifar(tmp_path, monkeypatch)
    marker = tmp_path / "executed"
    (place / name).write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(DataError, match=r"no intact copy.*MD5"):
        open_set("cifar10", data=str(tmp_path), batch_size=10)
    assert not marker.exists()


def test_missing_cifar_names_the_folder_and_the_ways_out(tmp_path):
    with pytest.raises(
        DataError, match=r"CIFAR100: no intact copy in .*`download=True`.*`data=DIR`"
    ):
        open_set("cifar100", data=str(tmp_path))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion-mnist"])
@pytest.mark.parametrize(
    "error", [OSError("no route\nto host"), RuntimeError("File not found or corrupted.")]
)
def test_a_failed_download_is_one_clear_line(tmp_path, monkeypatch, dataset, error):
    def fail(*_arguments, **_options):
        raise error

    for module in (torchvision.datasets.cifar, torchvision.datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    with pytest.raises(DataError, match=r"the download into .* failed") as caught:
        open_set(dataset, data=str(tmp_path), download=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Fashion-MNIST is nowhere on this machine, and its server has a small one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    source = tmp_path / "server"
    write_fashion(source)

    def fetch(url, download_root, filename, md5):
        raw = gzip.decompress((source / filename).read_bytes())
        (tmp_path / "pgt-diag/FashionMNIST/raw" / filename.removesuffix(".gz")).write_bytes(raw)

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)


def test_a_download_goes_to_the_users_cache_and_is_found_there_afterwards(offered):
    fetched = open_set("fashion-mnist", download=True)
    assert fetched.train_size == 100
    assert open_set("fashion-mnist").description() == fetched.description()


def test_a_sweep_fetches_its_data(offered, tmp_path):
    grid = tmp_path / "grid.toml"
    # A row that cannot be made is told when its turn comes.
    grid.write_text('dataset = "fashion-mnist"\nbatch_size = [8, 5000]\n')
    command = ["sweep", f"--config={grid}", f"--sweep-dir={tmp_path / 'runs'}", "--engine=slurm"]
    assert main([*command, "--download"]) == 0
    assert open_set("fashion-mnist").train_size == 100
    assert main([*command, "--download", "--set=dataset=imagefolder", "--set=data=x"]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_cpu():
    config = RunConfig(dataset=DatasetName.SYNTHETIC, augment=Augment.SMALL, batch_size=64)
    on_cpu, on_gpu = load_data(config), load_data(config, device="cuda")
    for (one, target), (two, target_two) in zip(
        on_cpu.train_batches(1), on_gpu.train_batches(1), strict=True
    ):
        assert two.is_cuda
        assert torch.allclose(one, two.cpu(), atol=1e-6)
        assert torch.equal(target, target_two.cpu())
