"""Which runs a sweep is made of, and what their directories are called."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from commands.app import main
from pgt_diag.config import PRESETS, LrRule, Preset, RunConfig
from pgt_diag.errors import ConfigurationError
from pgt_diag.paper import TABLE_1, TABLE_2, TABLE_3
from pgt_diag.sweep.grid import (
    Row,
    SweepPreset,
    build_grid,
    deciding,
    parse_value,
    read_grid,
)

TINY = {
    "dataset": "synthetic",
    "synthetic_images": 32,
    "image_size": 32,
    "model": "squeezenet1_1",
    "epochs": 2,
    "batch_size": 8,
}


def grid_of(tmp_path: Path, text: str, **options: Any):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return build_grid(None, read_grid(file), options, source="grid.toml")


@pytest.mark.parametrize(("preset", "scale", "seeds"), [("table2", 1, 5), ("table2-smoke", 8, 3)])
def test_table2_has_the_ten_rows_of_the_paper(preset: str, scale: int, seeds: int) -> None:
    rows = build_grid(SweepPreset(preset)).rows
    found = [
        (row.config.batch_size, row.config.method, row.config.alpha, row.config.seed)
        for row in rows
    ]
    wanted = [
        (batch // scale, method, RunConfig.alpha if math.isnan(alpha) else alpha, seed)
        for batch, method, alpha, *_ in TABLE_2
        for seed in range(seeds)
    ]
    assert found == wanted
    assert len({row.name for row in rows}) == 10 * seeds


def test_table2_is_the_papers_recipe_at_one_learning_rate() -> None:
    grid = build_grid(SweepPreset.TABLE2, options={"seed": [0]})
    assert len(grid.rows) == 10
    for row in grid.rows:
        values = row.config.to_mapping()
        recipe = {key: value for key, value in PRESETS[Preset.PAPER].items() if key != "batch_size"}
        assert {key: values[key] for key in recipe} == recipe
        assert (row.config.momentum, row.config.weight_decay, row.config.nesterov) == (
            0.9, 5e-4, True
        )  # fmt: skip
    assert grid.rule == "constant (batch 256: lr 0.4; batch 512: lr 0.4; batch 1024: lr 0.4)"


def papers_rows(rows, *keys: str) -> list[tuple[Any, ...]]:
    """Return the grid's rows of the first seed as the paper's tables have them, α NaN for none."""
    values = [row.config.to_mapping() for row in rows if row.config.seed == 0]
    for each in values:
        each["alpha"] = each["alpha"] if each["method"] == "pgt" else None
    return [tuple(each[key] for key in keys) for each in values]


def without_nan(rows) -> list[tuple[Any, ...]]:
    return [tuple(None if value != value else value for value in row) for row in rows]


def test_table1_has_the_papers_networks_with_batch_norm_schedules_and_methods() -> None:
    rows = build_grid(SweepPreset.TABLE1).rows
    assert len(rows) == 14 * 3 == len({row.name for row in rows})
    found = papers_rows(rows, "model", "schedule", "method", "alpha")
    assert found == without_nan(row[:4] for row in TABLE_1)
    assert {(row.config.norm, row.config.batch_size, row.config.lr) for row in rows} == {
        ("batch", 1024, 0.4)
    }
    step = next(row.config for row in rows if row.config.schedule == "step")
    assert (step.step_epochs, step.epochs, step.warmup_epochs) == ((30, 60, 90), 100, 5)
    assert any(row.name.startswith("seresnet50-pgt-a0.3-b1024-s0-") for row in rows)


def test_table3_crosses_schedule_smoothing_and_alpha_on_resnet50() -> None:
    rows = build_grid(SweepPreset.TABLE3).rows
    assert len(rows) == 8 * 3
    found = papers_rows(rows, "schedule", "label_smoothing", "method", "alpha")
    assert found == without_nan(row[:4] for row in TABLE_3)
    assert {(row.config.model, row.config.norm) for row in rows} == {("resnet50", "batch")}
    # The plain ones are Table 1's own runs, in a shared folder made once.
    shared = {row.name for row in rows} & {row.name for row in build_grid(SweepPreset.TABLE1).rows}
    assert len(shared) == 3 * 3


def test_fig2_has_both_networks_and_the_short_run() -> None:
    rows = build_grid(SweepPreset.FIG2, options={"seed": [0]}).rows
    assert papers_rows(rows, "model", "method", "alpha", "epochs") == [
        ("resnet18", "baseline", None, 100), ("resnet18", "pgt", 0.25, 100),
        ("resnet50", "baseline", None, 100), ("resnet50", "pgt", 0.3, 100),
        ("resnet50", "pgt", 0.3, 60),
    ]  # fmt: skip


def test_the_linear_rule_scales_from_the_recipes_batch_size_or_the_one_given() -> None:
    def rates(**options: Any) -> dict[int, float]:
        grid = build_grid(SweepPreset.TABLE2, options={"lr_rule": "linear", **options})
        assert grid.lr_rule == LrRule.LINEAR
        return {row.config.batch_size: row.config.peak_lr for row in grid.rows}

    assert rates() == {256: 0.1, 512: 0.2, 1024: 0.4}
    assert rates(lr_base_batch=256) == {256: 0.4, 512: 0.8, 1024: 1.6}
    assert rates(lr=0.2) == {256: 0.05, 512: 0.1, 1024: 0.2}


def test_lists_are_axes_and_every_row_table_is_a_grid_over_what_is_above(tmp_path: Path) -> None:
    grid = grid_of(
        tmp_path,
        """
        preset = "smoke"
        batch-size = [32, 64]
        step-epochs = [3, 6]
        seed = [0, 1]
        [[row]]
        method = "baseline"
        weight-decay = [0, 1e-4]
        [[row]]
        method = ["pgt", "agc+pgt"]
        alpha = 0.5
        batch-size = 16
        """,
    )
    found = [
        (str(row.config.method), row.config.batch_size, row.config.weight_decay, row.config.seed)
        for row in grid.rows
    ]
    assert set(found) == {
        *(("baseline", b, d, s) for b in (32, 64) for d in (0.0, 1e-4) for s in (0, 1)),
        *((method, 16, 5e-4, s) for method in ("pgt", "agc+pgt") for s in (0, 1)),
    }
    assert len(found) == 12
    assert {row.config.step_epochs for row in grid.rows} == {(3, 6)}
    assert {row.config.epochs for row in grid.rows} == {PRESETS[Preset.SMOKE]["epochs"]}


def test_an_axis_that_a_method_does_not_use_makes_no_second_run(tmp_path: Path) -> None:
    text = """
    preset = "smoke"
    method = ["baseline", "pgt", "gc", "agc"]
    alpha = [0.25, 0.5]
    clip_norm = [1, 2, 4]
    agc_clip_factor = [0.01, 0.1]
    """
    methods = [str(row.config.method) for row in grid_of(tmp_path, text).rows]
    assert {method: methods.count(method) for method in methods} == {
        "baseline": 1, "pgt": 2, "gc": 3, "agc": 2
    }  # fmt: skip


def test_an_axis_of_a_list_is_a_list_of_lists(tmp_path: Path) -> None:
    rows = grid_of(tmp_path, 'preset = "smoke"\nstep_epochs = [[2], [2, 4]]').rows
    assert [row.config.step_epochs for row in rows] == [(2,), (2, 4)]


def test_options_replace_what_rows_say(tmp_path: Path) -> None:
    text = 'preset = "smoke"\n[[row]]\nbatch_size = 32\n[[row]]\nbatch_size = 64\nlr = 0.1'
    key, value = parse_value("batch-size=[8, 16]")
    rows = grid_of(tmp_path, text, **{key: value}).rows
    assert [(row.config.batch_size, row.config.lr) for row in rows] == [
        (8, 0.005), (16, 0.005), (8, 0.1), (16, 0.1)
    ]  # fmt: skip
    assert parse_value("method=agc+pgt") == ("method", "agc+pgt")
    assert parse_value("lr=1e-2") == ("lr", 0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alhpa = 0.5", "grid.toml: unknown key 'alhpa'; did you mean 'alpha'?"),
        ("lr_rul = 'linear'", "grid.toml: unknown key 'lr_rul'; did you mean 'lr_rule'?"),
        ("[[row]]\n[[row]]\nbatchsize = 3", "grid.toml: row 2: unknown key 'batchsize'; did you"),
        ("alpha = [0.5, 3]", "grid.toml: alpha is 3.0; it must lie in [0, 1]"),
        ("method = 'pqt'", "grid.toml: method is 'pqt'; choose one of baseline, pgt"),
        ("dataset = ['digits', 'x']", "grid.toml: dataset is 'x'; choose one of digits"),
        ("seed = []", "grid.toml: seed is []; name at least one value"),
        ("lr = 1\nlr-rule = 'linear'\nlr_rule = 'linear'", "grid.toml: lr_rule is given twice"),
        ("lr = 'high'", "grid.toml: lr is 'high'; it must be a number"),
        ("preset = 'table2'", "grid.toml: preset is 'table2'; choose one of smoke"),
        ("lr_rule = 'sqrt'", "grid.toml: lr_rule is 'sqrt'; choose one of constant, linear"),
        ("lr_base_batch = 64", "grid.toml: lr_base_batch has no effect with lr_rule constant"),
        ("[row]\nlr = 1", "grid.toml: row is {'lr': 1}; write tables, each under [[row]]"),
        ("row = 3", "grid.toml: row is 3; write tables, each under [[row]]"),
        ("seed = [", "grid.toml: cannot be read as TOML"),
        (
            f"seed = {list(range(400))}\nlr = {[0.1] * 400}",
            "grid.toml: its axes make 160,000 runs; 100,000",
        ),
    ],
)
def test_a_grid_that_cannot_be_used_is_told_in_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("grid.toml").write_text(text)
    assert main(["sweep", "--config", "grid.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pgt-diag: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a sweep: --preset table1, table2, table2-smoke, table3, fig2, or a grid with"),
        (["--config=none.toml"], "none.toml: cannot be read as TOML"),
        (["--preset=table2", "--set", "lr"], "--set is 'lr'; write KEY=VALUE"),
        (["--preset=table2", "--ray-address=a"], "--ray-address has no effect with --engine local"),
        (["--preset=table2", "--gpus-per-run=1"], "--gpus-per-run has no effect with --engine lo"),
        (
            ["--preset=table2", "--engine=slurm", "--cpus-per-run=0.5"],
            "--cpus-per-run is 0.5; Slurm gives whole ones",
        ),
        (
            ["--preset=table2", "--engine=ray", "--nproc=2", "--gpus-per-run=1"],
            "--gpus-per-run is 1 and --nproc 2: each process needs its own GPU",
        ),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["sweep", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"pgt-diag: error: {message}")


def test_a_name_stands_for_what_decides_the_result_and_for_nothing_else() -> None:
    row = Row(RunConfig(method="agc+pgt", alpha=0.5, batch_size=32, seed=7), Preset.SMOKE)
    assert row.name.startswith("agc+pgt-a0.5-b32-s7-")
    assert len(row.name.rpartition("-")[2]) == 8
    elsewhere = {
        "data": "somewhere", "device": "cpu", "threads": 3, "workers": 2, "checkpoint_every": 5
    }  # fmt: skip
    for key, value in elsewhere.items():
        other = dataclasses.replace(row.config, **{key: value})
        assert Row(other, Preset.SMOKE).name == row.name, key
    normalised = dataclasses.replace(row.config, norm="batch", model="timm/a/../b c")
    assert Row(normalised, Preset.SMOKE).name.startswith("b_c-agc+pgt-a0.5-b32-s7-")
    others = {
        "alpha": 0.25, "lr": 0.2, "weight_decay": 0.0, "model": "resnet34", "seed": 8,
        "clip_norm": 3.0, "agc_clip_factor": 0.02, "epochs": 99, "record_every": 2,
    }  # fmt: skip
    names = {
        Row(dataclasses.replace(row.config, **{key: value}), Preset.SMOKE).name
        for key, value in others.items()
    }
    assert len(names | {row.name}) == len(others) + 1


@pytest.mark.parametrize(
    "values",
    [
        {"method": "agc+pgt", "alpha": 0.92, "agc_clip_factor": 0.1, "agc_classifier": True},
        {"method": "gc", "clip_norm": 1.5, "nesterov": False, "threads": 1},
        {"step_epochs": [1], "schedule": "step", "warmup_epochs": 2.0, "lr": 1e-07},
        {"epochs": 1, "checkpoint_every": 7, "device": "cpu", "record_every": 3},
        {"lr_rule": "linear", "lr_base_batch": 32, "lr_update": "epoch"},
        {"warmup_prefix": False, "cooldown_epochs": 1, "min_lr": 1e-4, "warmup_epochs": 0},
        {"schedule": "step", "cooldown_epochs": 1, "model": "resnet18", "norm": "batch"},
    ],
)
def test_the_command_of_a_row_trains_that_row(
    values: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    (row,) = build_grid(None, {"preset": "smoke", **TINY, **values}).rows
    command = row.command(tmp_path / "a run")
    assert command[:2] == ["pgt-diag", "train"]
    assert main([*command[1:], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert RunConfig.from_mapping(plan["config"]) == row.config
    assert plan["directory"] == str(tmp_path / "a run")


def test_what_cannot_be_a_grid_is_an_error_of_configuration() -> None:
    with pytest.raises(ConfigurationError, match="row"):
        build_grid(None, {"row": []})
    assert "device" not in deciding(RunConfig())
