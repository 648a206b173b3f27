"""The smoke preset as the README runs it: real images, real learning, real zero-outs."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

import pgt_diag
from commands.app import main
from pgt_diag.config import Preset, compose
from pgt_diag.filters import deaths
from pgt_diag.progress import Listener
from pgt_diag.training import train


def check_that_filters_died_on_the_way(run: pgt_diag.Run) -> None:
    died = deaths(run.events, run.iteration_count)
    assert (died["iteration"].between(1, 100)).any(), "no filter died while training"
    assert died["revival_iteration"].isna().any(), "no filter is dead at the end"
    assert len(run.weight_norms("layer4.1.conv2")) == run.iteration_count
    assert len(run.feature_maps) > 5


@pytest.mark.long
@pytest.mark.parametrize("method", ["baseline", "pgt"])
def test_smoke_learns_digits_and_filters_die_on_the_way(method: str, tmp_path: Path) -> None:
    folder = tmp_path / method
    assert main(["train", "--preset=smoke", f"--method={method}", f"--run-dir={folder}"]) == 0
    run = pgt_diag.load_run(folder)
    assert run.metrics["test_accuracy"].iloc[-1] > 93
    check_that_filters_died_on_the_way(run)


class UntilEpoch(Listener):
    """Asks for a stop after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self._left = epochs

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        """Count it."""
        self._left -= 1

    def stop(self) -> bool:
        """Whether they are over."""
        return self._left <= 0


def test_the_first_half_of_smoke_learns_digits_and_filters_die_on_the_way(tmp_path: Path) -> None:
    config, _ = compose(Preset.SMOKE, {}, {"method": "pgt"})
    # The learning rate has then been at its highest, where training is least steady.
    half = UntilEpoch(config.epochs // 2)
    assert config.epochs // 2 > config.warmup_epochs
    with contextlib.suppress(KeyboardInterrupt):
        train(config, tmp_path / "pgt", listener=half, stop=half.stop)
    run = pgt_diag.load_run(tmp_path / "pgt")
    assert len(run.metrics) == config.epochs // 2
    assert run.metrics["test_accuracy"].max() > 93
    check_that_filters_died_on_the_way(run)
