"""Configurations: every mistake named, every preset usable, order of precedence."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from pgt_diag.config import (
    PRESETS,
    Method,
    Preset,
    RunConfig,
    Schedule,
    compose,
    meant,
    read_toml,
)
from pgt_diag.errors import ConfigurationError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.5}, r"alpha is 1\.5; it must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "high"}, "alpha is 'high'; it must be a number"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
        ({"epochs": True}, "epochs is True"),
        ({"epochs": 0}, "epochs is 0; it must be a number of at least 1"),
        ({"lr": 0.0}, "lr is 0; it must be greater than 0"),
        ({"method": "PGT"}, "method is 'PGT'; choose one of baseline, pgt, gc"),
        ({"metod": "pgt"}, "unknown key 'metod'; did you mean 'method'"),
        ({"warmup_epochs": 9, "epochs": 3}, "warmup_epochs is 9.0, more than the run's 3 epochs"),
        ({"step_epochs": [60, 30]}, "step_epochs is .* increase"),
        ({"step_epochs": "30"}, "step_epochs is '30'; it must be a list of integers"),
        ({"device": "cpu", "amp": "bf16"}, "bf16 needs a GPU"),
        ({"decode": "gpu"}, "decode is gpu and dataset is digits; only imagefolder has files"),
        ({"momentum": 0.0}, "nesterov is on and momentum is 0"),
        ({"cooldown_epochs": 5}, "cooldown_epochs is 5 and min_lr is 0: .*set min_lr"),
        (
            {"cooldown_epochs": 6, "epochs": 10, "min_lr": 1e-4},
            "cooldown_epochs is 6, and 5 of the run's 10 epochs are warm-up",
        ),
        ({"lr_update": "batch"}, "lr_update is 'batch'; choose one of iteration, epoch"),
        ({"lr_rule": "linear"}, "lr_rule is linear and lr_base_batch is not given"),
        ({"data": ""}, "data is ''; name a folder"),
        ({"lr": 1e39}, r"lr is 1e\+39; it must be at most 3e\+38"),
        ({"lr": math.inf}, r"lr is inf; it must be at most 3e\+38"),
        ({"method": "agc", "agc_clip_factor": 0.0}, "agc_clip_factor is 0; it must be greater"),
        ({"method": "agc+pgt", "agc_eps": 0.0}, "agc_eps is 0; it must be greater than 0"),
        (
            {"lr": 1e38, "lr_rule": "linear", "lr_base_batch": 1},
            r"lr is 1e\+38 for batches of 1: for those of 256 it would be 2\.56e\+40",
        ),
        ({"lr_base_batch": 256}, "lr_base_batch has no effect with lr_rule constant"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_the_remedy(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RunConfig.from_mapping(values)


def test_plain_values_and_back_is_the_same_configuration() -> None:
    config = RunConfig(method=Method.AGC_PGT, schedule=Schedule.STEP, step_epochs=(2, 5), data="x")
    assert RunConfig.from_mapping(config.to_mapping()) == config
    assert all(
        type(value) in {str, int, float, bool, list, type(None)}
        for value in config.to_mapping().values()
    )


@pytest.mark.parametrize("preset", Preset)
def test_presets_hold_only_known_keys_and_usable_values(preset: Preset) -> None:
    config, used = compose(preset, {}, {})
    assert used is preset
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(PRESETS[preset]) <= fields


def test_options_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "fashion"\nbatch-size = 64\nlr = 0.5\nmethod = "gc"\n')
    values, preset = read_toml(file)
    config, used = compose(preset, values, {"lr": 0.25})
    assert used is Preset.FASHION
    assert (config.lr, config.batch_size, config.method) == (0.25, 64, Method.GC)
    assert config.epochs == PRESETS[Preset.FASHION]["epochs"]


def test_a_preset_fits_the_model_and_the_length_it_is_given() -> None:
    assert compose(None, {}, {})[0].stem == "small"
    assert compose(None, {}, {"model": "vgg11"})[0].stem == "imagenet"
    assert compose(None, {}, {"model": "vgg11", "stem": "small"})[0].stem == "small"
    assert compose(None, {}, {"epochs": 2})[0].warmup_epochs == 1.0
    with pytest.raises(ConfigurationError, match=r"warmup_epochs is 4\.0, more than"):
        compose(None, {}, {"epochs": 2, "warmup_epochs": 4.0})


def test_the_linear_rule_counts_from_the_presets_batch_size_unless_told() -> None:
    asked = {"lr_rule": "linear", "batch_size": 256}
    assert compose(Preset.PAPER, {}, asked)[0].peak_lr == pytest.approx(0.1)
    assert compose(Preset.PAPER, {}, {**asked, "lr_base_batch": 256})[0].peak_lr == 0.4
    assert compose(Preset.PAPER, {"lr": 0.2}, asked)[0].peak_lr == pytest.approx(0.05)


def test_the_data_set_chooses_the_preset_when_none_is_named() -> None:
    assert compose(None, {}, {})[1] is Preset.SMOKE
    assert compose(None, {"dataset": "imagefolder"}, {})[1] is Preset.PAPER
    assert compose(None, {"dataset": "imagefolder"}, {"dataset": "cifar10"})[1] is Preset.FASHION


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "cannot be read as TOML"),
        ("epoch = 3", "unknown key 'epoch'; did you mean 'epochs'"),
        ('preset = "smok"', "preset is 'smok'; choose one of smoke, fashion, paper"),
        ("preset = [1]", "preset is"),
        ("[lr]\nx = 1", "lr is"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"run\.toml: .*{message}"):
        read_toml(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no\.toml: cannot be read"):
        read_toml(tmp_path / "no.toml")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\n", encoding="utf-8-sig")
    assert read_toml(file)[0] == {"epochs": 3}
    file.write_text("epochs = 3\n", encoding="utf-16")
    with pytest.raises(ConfigurationError, match="it is not UTF-8 text; save it as that"):
        read_toml(file)


def test_automatic_recording_is_a_value_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('record_every = "auto"\n')
    assert read_toml(file)[0] == {"record_every": None}
    assert RunConfig.from_mapping({"record_every": "auto"}).record_every is None


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("epohcs", "; did you mean 'epochs'?"),
        ("warmup-lr", "; did you mean 'warmup_lr'?"),
        ("scheduler", "; did you mean 'schedule'?"),
        ("wd", "; did you mean 'weight_decay'?"),
        ("label", "; did you mean 'label_smoothing'?"),
        ("fail_if_dead", ""),
        ("junit", ""),
        ("verbose", ""),
        ("x", ""),
        ("", ""),
    ],
)
def test_only_a_key_that_is_near_is_suggested(key: str, suggestion: str) -> None:
    known = [field.name for field in dataclasses.fields(RunConfig)]
    assert meant(key, known) == suggestion
