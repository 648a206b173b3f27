"""The smoke preset as the README runs it: real images, real learning, real zero-outs."""

from pathlib import Path

import pytest

import pgt_diag
from commands.app import main
from pgt_diag.filters import deaths


@pytest.mark.parametrize("method", [pytest.param("baseline", marks=pytest.mark.long), "pgt"])
def test_smoke_learns_digits_and_filters_die_on_the_way(method: str, tmp_path: Path) -> None:
    folder = tmp_path / method
    assert main(["train", "--preset=smoke", f"--method={method}", f"--run-dir={folder}"]) == 0
    run = pgt_diag.load_run(folder)
    assert run.metrics["test_accuracy"].iloc[-1] > 93
    died = deaths(run.events, run.iteration_count)
    assert (died["iteration"].between(1, 100)).any(), "no filter died while training"
    assert died["revival_iteration"].isna().any(), "no filter is dead at the end"
    assert len(run.weight_norms("layer4.1.conv2")) == run.iteration_count
    assert len(run.feature_maps) > 5
