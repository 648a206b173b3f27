"""What a dry run accepts, training does not refuse: the ends of every range, a step each."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from pgt_diag.config import _RANGES, compose
from pgt_diag.errors import ConfigurationError, DivergedError, PgtDiagError
from pgt_diag.training import plan, train
from tests.damage import OPTIONS

METHODS = {"alpha": "pgt", "clip_norm": "gc", "agc_clip_factor": "agc", "agc_eps": "agc"}
TOO_MUCH = {"image_size", "synthetic_images", "synthetic_classes", "workers", "threads"}
"""Whose largest values take a machine that tests have not got."""
SMALL = {**OPTIONS, "norm": "none", "epochs": 1, "warmup_epochs": 0.0, "feature_map_snapshots": 1}


def ends() -> list[tuple[str, float]]:
    found = []
    for key, low, high in _RANGES:
        values = [low] if key in TOO_MUCH else [low, min(high, 1e300)]
        whole = type(SMALL.get(key, 0)) is int and key not in METHODS
        found += [(key, int(value) if whole and value < 1e300 else value) for value in values]
    return [*found, ("agc_clip_factor", 1e-300), ("agc_eps", 1e-300), ("clip_norm", 1e-300)]


@pytest.mark.parametrize(("key", "value"), ends())
def test_a_value_is_refused_before_the_first_step_or_never(
    key: str, value: Any, tmp_path: Path
) -> None:
    method = METHODS.get(key, "baseline")
    values = {**SMALL, "method": method, "nesterov": key != "momentum", key: value}
    directory = tmp_path / "run"
    try:
        config = compose(None, {}, values)[0]
        plan(config, directory)
    except PgtDiagError:
        return
    with contextlib.suppress(DivergedError, KeyboardInterrupt):
        train(config, directory, stop=lambda: True)


@pytest.mark.parametrize(
    "values",
    [
        {"norm": "batch", "batch_size": 1},
        {"norm": "batch", "batch_size": 2, "accumulate": 2},
        {"norm": "batch", "model": "resnet18", "stem": "imagenet", "batch_size": 1},
        {"step_epochs": [10**30]},
        {"lr_rule": "linear", "lr_base_batch": 10**9, "lr": 1e-320, "warmup_epochs": 1.0},
        {"lr_rule": "linear", "lr_base_batch": 1, "lr": 1e308, "warmup_epochs": 1.0},
        {"warmup_epochs": 1e-300},
        {"seed": 2**63 - 1, "method": "pgt"},
        {"feature_map_images": 64},
    ],
    ids=str,
)
def test_values_that_fit_alone_are_refused_together_before_the_first_step_or_never(
    values: dict[str, Any], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    try:
        config = compose(None, {}, {**SMALL, **values})[0]
        plan(config, directory)
    except PgtDiagError:
        return
    with contextlib.suppress(DivergedError, KeyboardInterrupt):
        train(config, directory, stop=lambda: True)


def test_one_image_at_a_time_is_refused_where_batch_norm_has_one_value(tmp_path: Path) -> None:
    one = {**SMALL, "norm": "batch", "model": "resnet18", "stem": "imagenet", "batch_size": 1}
    for values in (one, {**one, "batch_size": 3, "accumulate": 2}):
        with pytest.raises(ConfigurationError, match="needs more than one image at a time"):
            plan(compose(None, {}, values)[0], tmp_path / "run")
    plan(compose(None, {}, {**one, "batch_size": 2})[0], tmp_path / "run")
    plan(compose(None, {}, {**one, "norm": "none"})[0], tmp_path / "run")
