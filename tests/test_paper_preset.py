"""`pgt-diag train --preset paper` from the command to the report, on real JPEG files."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import pgt_diag
from commands.app import main
from pgt_diag.config import PRESETS, Preset, RunConfig
from pgt_diag.schedules import learning_rate

TRAIN, TEST = 520, 20
"""Images of each of two classes: enough for one iteration of the paper's largest batch."""


def photographs():
    """Yield crops of scikit-learn's two photographs, the classes by turns."""
    china, flower = (Image.fromarray(each) for each in load_sample_images().images)
    random = np.random.default_rng(0)
    while True:
        for photograph in (china, flower):
            x, y = (int(random.integers(side - 96)) for side in photograph.size)
            yield photograph.crop((x, y, x + 96, y + 96)).resize((40, 40))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """An ImageNet-style folder of photographs and digits, as JPEG: also gray, CMYK, turned."""
    root = tmp_path_factory.mktemp("imagenet")
    crops, digits = photographs(), load_digits().images
    for split, count in (("train", TRAIN), ("val", TEST)):
        for name in ("n01440764", "n01443537"):
            (root / split / name).mkdir(parents=True)
        for number in range(count):
            for name in ("n01440764", "n01443537"):
                next(crops).save(root / split / name / f"{number}.JPEG")
        gray = Image.fromarray((digits[0] * 16).clip(0, 255).astype(np.uint8)).resize((48, 40))
        gray.save(root / split / "n01440764" / "1.JPEG")
        gray.convert("CMYK").save(root / split / "n01443537" / "1.JPEG")
        turned = Image.Exif()
        turned[0x0112] = 6
        next(crops).save(root / split / "n01443537" / "2.JPEG", exif=turned)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "data", copy_function=shutil.copy)


def train(root, run_dir, *options):
    # The images' size, the epochs and the machine; and 0.4 needs a longer warm-up than that.
    small = [
        "--image-size=32",
        "--epochs=1",
        "--lr=0.05",
        "--workers=0",
        "--threads=1",
        "--device=cpu",
    ]
    arguments = [f"--data={root}", f"--run-dir={run_dir}", "--feature-map-snapshots=2"]
    return main(["train", "--preset", "paper", *arguments, *small, *options])


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [
        (256, ["--method=baseline", "--lr-rule=linear", "--lr=0.2"]),
        (512, ["--method=pgt"]),
        (1024, ["--method=agc+pgt", "--alpha=0.92", "--accumulate=4", "--amp=off"]),
    ],
)
def test_the_papers_recipe_runs_at_its_batch_sizes(root, tmp_path, capsys, batch_size, options):
    assert train(root, tmp_path / "run", f"--batch-size={batch_size}", *options) == 0
    run = pgt_diag.load_run(tmp_path / "run")
    assert (run.status, run.iteration_count) == ("finished", 2 * TRAIN // batch_size)
    recipe = PRESETS[Preset.PAPER] | {"batch_size": batch_size, "epochs": 1, "warmup_epochs": 0.5}
    told = {key: getattr(run.config, key) for key in recipe if key not in ("workers", "lr")}
    assert told == {key: recipe[key] for key in told}
    assert (run.config.momentum, run.config.nesterov, run.config.weight_decay) == (0.9, True, 5e-4)
    assert run.config.peak_lr == pytest.approx(0.05), "0.2 is for the paper's batch of 1024"
    rates = [learning_rate(run.config, i, 2 * TRAIN // batch_size) for i in run.iterations.index]
    np.testing.assert_allclose(run.iterations["lr"], rates, rtol=1e-6)
    assert np.isfinite(run.metrics["test_loss"]).all()
    assert sum(layer.filters for layer in run.layers) == 4800
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 0
    assert 'id="table2"' in (tmp_path / "page.html").read_text()


def test_the_authors_code_is_a_choice_of_options(root, tmp_path):
    theirs = [
        "--batch-size=256", "--lr=0.02", "--lr-update=epoch", "--no-warmup-prefix",
        "--warmup-epochs=1", "--warmup-lr=0.01", "--cooldown-epochs=1", "--min-lr=1e-4",
    ]  # fmt: skip
    assert train(root, tmp_path / "run", "--epochs=3", *theirs) == 0
    rates = pgt_diag.load_run(tmp_path / "run").iterations["lr"].to_numpy().reshape(3, -1)
    # Of two epochs the cosine is halfway after one: the warm-up lies inside it.
    half = 1e-4 + (0.02 - 1e-4) / 2
    np.testing.assert_allclose(rates, np.array([[0.01], [half], [1e-4]]).repeat(4, 1), rtol=1e-6)


def test_an_empty_class_is_named_and_nothing_is_written(root, tmp_path, capsys):
    for split in ("train", "val"):
        (root / split / "n02000000").mkdir()
    assert train(root, tmp_path / "run", "--batch-size=256") == 3
    error = capsys.readouterr().err
    assert "no image in class folder" in error and "train/n02000000" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_corrupt_files_are_named_or_replaced_and_recorded(root, tmp_path, capsys):
    spoilt = root / "train" / "n01443537" / "7.JPEG"
    spoilt.write_bytes(spoilt.read_bytes()[:300])
    other = root / "val" / "n01440764" / "3.JPEG"
    other.write_text("<html>not found</html>")
    assert train(root, tmp_path / "stops", "--batch-size=512") == 3
    assert f"{spoilt}" in capsys.readouterr().err.splitlines()[-1]
    assert train(root, tmp_path / "goes-on", "--batch-size=1024", "--bad-images=skip") == 0
    told = json.loads((tmp_path / "goes-on" / "run.json").read_text())["bad_images"]
    assert [each["path"] for each in told] == [
        "train/n01443537/7.JPEG", "val/n01440764/3.JPEG"
    ]  # fmt: skip


def test_the_options_of_the_preset_are_the_papers_section_4():
    config = RunConfig.from_mapping(PRESETS[Preset.PAPER])
    assert (config.batch_size, config.epochs, config.lr) == (1024, 100, 0.4)
    assert (config.warmup_epochs, config.warmup_lr) == (5, 4e-4)
    assert (config.weight_decay, config.momentum) == (5e-4, 0.9)
    assert (config.nesterov, config.schedule, config.step_epochs) == (True, "cosine", (30, 60, 90))
    assert (config.norm, config.stem, config.model) == ("none", "imagenet", "resnet18")
