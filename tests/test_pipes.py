"""Readers that stop early: `| head`, a `tee` that dies, a closed pager."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands.app import main
from pgt_diag.run import load_run
from tests.runs import being_written, edit

ROOT = Path(__file__).parent.parent
TINY = [
    "--dataset=synthetic", "--synthetic-images=32", "--image-size=32", "--batch-size=16",
    "--device=cpu", "--threads=1", "--epochs=1", "--warmup-epochs=0", "--model=squeezenet1_1",
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "run"
    assert main(["train", *TINY, f"--run-dir={path}"]) == 0
    return path


@pytest.fixture
def folder(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path


def without_reader(*arguments, **options):
    """Run a command whose standard output nobody reads; return its exit code and its errors."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pgt_diag", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(timeout=120), errors


@pytest.mark.parametrize("arguments", [["show", "run"], ["train", "--help"], ["watch", "run"]])
def test_a_reader_that_stops_early_is_no_error(arguments, folder):
    assert without_reader(*arguments, cwd=folder) == (0, "")


def test_training_goes_on_without_its_reader(tmp_path):
    arguments = ["train", *TINY, "--run-dir=run"]
    assert without_reader(*arguments, cwd=tmp_path) == (0, "")
    assert load_run(tmp_path / "run").status == "finished"


def test_watching_ends_with_its_reader(folder):
    edit(folder / "run", status="running")
    with being_written(folder / "run"):
        assert without_reader("watch", "run", "--interval=0.1", cwd=folder) == (0, "")
