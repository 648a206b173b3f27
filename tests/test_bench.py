"""`pgt-diag bench`: what it prints, what it counts, and how it alternates. Never how fast it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands.app import main
from pgt_diag import bench
from pgt_diag.config import Norm, Stem
from pgt_diag.models import build_model

ROOT = Path(__file__).parent.parent
TINY = ("--size", "8", "--batch-size", "2", "--seconds", "0.3", "--device", "cpu")
SPREADS = [
    ("recording", "overhead_percent"),
    ("recording", "plain_ms"),
    ("recording", "recorded_ms"),
    ("loss", "ratio_to_cross_entropy"),
    ("loss", "ms"),
    ("agc", "ms"),
]
POSITIVE = [
    ("recording", "pairs"),
    ("recording", "steps_per_block"),
    ("rate", "images_per_second"),
    ("rate", "iterations_per_second"),
    ("roofline", "flops_per_image"),
    ("roofline", "matmul_flops_per_second"),
    ("roofline", "share_percent"),
    ("agc", "share_of_step_percent"),
    ("trace", "bytes_per_iteration"),
    ("trace", "encoding_us_per_iteration"),
]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "pgt_diag", "bench", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_json_has_every_number_and_its_spread_and_nothing_is_left_behind(tmp_path):
    result = run(*TINY, "--json", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    for section, key in POSITIVE:
        assert found[section][key] > 0, key
    for section, key in SPREADS:
        spread = found[section][key]
        assert spread["low"] <= spread["median"] <= spread["high"], key
    assert found["settings"] == {
        "model": "resnet18", "stem": "imagenet", "size": 8, "batch_size": 2, "seconds": 0.3,
    }  # fmt: skip
    assert found["machine"]["threads"] >= 1
    assert found["machine"]["torch"] == torch.__version__
    assert found["trace"]["filters"] == 4800
    assert (found["loss"]["examples"], found["loss"]["classes"]) == (1024, 1000)
    assert not any(tmp_path.iterdir())


def test_the_table_names_the_machine_and_warns_of_other_load(capsys):
    assert main(["bench", *TINY, "--stem", "small"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    *rows, last = output.out.splitlines()
    assert [row[:11].rstrip() for row in rows] == [
        "machine", "versions", "network", "recording", "rate", "roofline", "PGT loss", "AGC",
        "trace",
    ]  # fmt: skip
    assert "threads on" in rows[0]
    assert f"torch {torch.__version__}" in rows[1]
    assert "Other load" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet81"), "model is 'resnet81', and there is none; did you mean"),
        (("--model", "alexnet"), "alexnet cannot train on images of 8×8: "),
        (("--model", "alexnet", "--stem", "small"), "stem is small and model is alexnet"),
        (("--size", "0"), "--size is 0; it must be a number of at least 1"),
        (("--batch-size", "0"), "--batch-size is 0; it must be"),
        (("--batch-size", str(10**15)), "memory does not hold so many images of 8×8"),
        (("--seconds", "nan"), "--seconds is nan; it must be"),
        (("--seconds", "0"), "--seconds is 0; it must be"),
        (("--device", "tpu"), "--device is 'tpu'; choose one of"),
    ],
)
def test_a_mistake_gives_one_line(arguments, message, capsys):
    assert main(["bench", *TINY, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("pgt-diag: error: ")
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def resnet18_flops(size: int, stem: Stem, classes: int) -> int:
    """Count by hand: 2·k²·in·out·pixels a convolution forward, as much for each gradient."""
    side = size // 2 if stem is Stem.IMAGENET else size
    first = 2 * (49 if stem is Stem.IMAGENET else 9) * 3 * 64 * side**2
    side = side // 2 if stem is Stem.IMAGENET else side
    others = 4 * 2 * 9 * 64 * 64 * side**2
    for width in (128, 256, 512):
        side //= 2
        others += 2 * 9 * (width // 2) * width * side**2 + 3 * 2 * 9 * width * width * side**2
        others += 2 * (width // 2) * width * side**2  # downsample
    others += 2 * 512 * classes
    # Nobody asks for the gradient of the images.
    return 2 * first + 3 * others


@pytest.mark.parametrize(
    ("size", "stem", "gflop"),
    [(224, Stem.IMAGENET, 10.65), (32, Stem.IMAGENET, 0.22), (32, Stem.SMALL, 3.3)],
)
def test_flops_of_a_training_image_are_those_counted_by_hand(size, stem, gflop):
    counted = bench.flops_per_image(build_model("resnet18", num_classes=1000, stem=stem), size)
    assert counted == resnet18_flops(size, stem, 1000)
    assert counted / 1e9 == pytest.approx(gflop, rel=0.02)


def test_counting_flops_leaves_the_model_as_it_is():
    model = build_model("resnet18", num_classes=10, norm=Norm.BATCH).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bench.flops_per_image(model, 32)
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rounds_alternate_and_only_the_parts_are_timed():
    told = []
    now = 0.0

    def part(name, seconds):
        def spend():
            nonlocal now
            told.append(name)
            now += seconds

        return spend

    spent = bench.alternate(
        {"one": part("one", 1.0), "two": part("two", 2.0)},
        rounds=3,
        between=part("between", 10.0),
        clock=lambda: now,
    )
    assert told[::2] == ["between"] * 6
    assert told[1::2] == ["one", "two", "two", "one", "one", "two"]
    assert spent == {"one": [1.0] * 3, "two": [2.0] * 3}
    assert bench.ratio(spent, "two", "one") == bench.Spread(2.0, 2.0, 2.0)


def test_a_spread_is_median_and_quartiles_in_any_unit():
    spread = bench.Spread.of([4.0, 0.0, 1.0, 3.0, 2.0])
    assert spread == bench.Spread(median=2.0, low=1.0, high=3.0)
    assert spread * 10 == bench.Spread(20.0, 10.0, 30.0)
