"""Mistakes that need neither data nor a network are told before torch is loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision

from pgt_diag import preflight
from pgt_diag.config import RunConfig
from pgt_diag.errors import ConfigurationError
from pgt_diag.parent import Place, place

ROOT = Path(__file__).parent.parent
CODE = (
    "import sys; from commands.app import main; code = main(sys.argv[1:])\n"
    "sys.exit(99 if 'torch' in sys.modules else code)"
)
DRY_SWEEP = ["sweep", "--preset=table2", "--dry-run"]
MISTAKES = {
    "a folder for digits": (["train", "--data=x"], "--data is 'x', but dataset is digits"),
    "a stem": (["train", "--model=vgg11", "--stem=small"], "only ResNets have that stem"),
    "a model": (["train", "--model=resnet19"], "--model is 'resnet19', .* did you mean resnet18"),
    "no folder": (["train", "--dataset=imagefolder"], "--dataset is imagefolder; name its folder"),
    "a missing folder": (
        ["train", "--dataset=imagefolder", "--data=nowhere"],
        "no folder 'train' in 'nowhere'",
    ),
    "missing images": (["train", "--dataset=fashion-mnist", "--data=."], "are not in "),
    "a missing CIFAR": (["train", "--dataset=cifar100", "--data=."], "CIFAR100: no intact copy in"),
    "no download": (["train", "--dataset=imagefolder", "--data=.", "--download"], "cannot be down"),
    "a batch of digits": (["train", "--batch-size=1439"], "digits has only 1438"),
    "a batch of made-up images": (
        ["train", "--dataset=synthetic", "--batch-size=513"],
        "--batch-size is 513, but synthetic has only 512",
    ),
    "classes": (
        ["train", "--dataset=synthetic", "--synthetic-images=64", "--synthetic-classes=65"],
        "--synthetic-images is 64, fewer than the 65 classes",
    ),
    "processes": (["train", "--nproc=65"], "--batch-size is 64: 65 processes|batch_size is 64: 65"),
    "a directory in use": (["train", "--run-dir=taken"], "taken: holds other files"),
    "no run to go on with": (["train", "--run-dir=new", "--resume"], "new: no run here"),
    "AGC's factor": (["train", "--method=agc", "--agc-clip-factor=0"], "--agc-clip-factor is 0;"),
    "AGC's floor": (["train", "--method=agc+pgt", "--agc-eps=0"], "--agc-eps is 0; .*greater"),
    "a sweep without data": (DRY_SWEEP, "dataset is imagefolder; name its folder"),
    "a sweep's missing data": ([*DRY_SWEEP, "--data=nowhere"], "no folder 'train' in 'nowhere'"),
    "a sweep's model": (["sweep", "--preset=table2-smoke", "--set=model=vgg"], "did you mean vgg1"),
    "check of no run": (["check", "nowhere"], "nowhere: no such directory"),
    "show of no run": (["show", "taken"], "taken: no run here"),
    "report of no run": (["report", "nowhere"], "nowhere: no such directory"),
}


def told(arguments: list[str], cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Run a command that must not load torch: its code is 99 if it does."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_torch_is_loaded(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    arguments, message = MISTAKES[mistake]
    code, output, error = told(arguments, tmp_path)
    assert code in (2, 3), error
    assert output == ""
    (line,) = error.splitlines()
    assert re.search(message, line), line


ENVIRONMENTS = {
    "no rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, and RANK is not set"),
    "no number": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment, and no whole"),
    "no number of mine": ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
    "nobody": ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is not set|RANK is 0"),
    "a rank too large": (
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        "RANK is 2, LOCAL_RANK 0 and WORLD_SIZE 2",
    ),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    "a port": ({"WORLD_SIZE": "2", "MASTER_PORT": "a"}, "MASTER_PORT is 'a'"),
}


@pytest.mark.parametrize("fault", ENVIRONMENTS)
def test_an_environment_that_torchrun_would_not_set_is_told(fault: str, tmp_path: Path) -> None:
    variables, message = ENVIRONMENTS[fault]
    code, _, error = told(["train"], tmp_path, **variables)
    assert code == 2
    (line,) = error.splitlines()
    assert re.search(message, line), line
    assert "torchrun" in line


def test_the_place_of_a_process_is_what_torchrun_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() == Place(0, 0, 1)
    values = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    for name, value in {**values, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(rank=5, local_rank=1, size=8)


def test_the_names_in_torchvisions_files_are_those_that_it_lists() -> None:
    listed = torchvision.models.list_models(module=torchvision.models)
    assert set(preflight._torchvision_names()) == {name for name in listed if "test" not in name}


def test_what_torchvision_knows_by_another_way_is_not_refused() -> None:
    preflight.check_choices(RunConfig(model="my_own", batch_size=64))  # torchvision is loaded here


def test_a_folder_that_has_everything_passes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    config = RunConfig(dataset="imagefolder", data=str(tmp_path))  # type: ignore[arg-type]
    preflight.check_there(config)
    with pytest.raises(ConfigurationError, match="cannot be downloaded"):
        preflight.check_download(config)
