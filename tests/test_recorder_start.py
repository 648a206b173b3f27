"""A recorder that cannot begin: told at the call, with nothing kept locked or left behind."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pgt_diag
from pgt_diag import directory, training
from pgt_diag.directory import RunDirectory
from pgt_diag.errors import ConfigurationError, RecorderError, RunDirectoryError
from pgt_diag.powergrad import power_grad_gradient_reference
from pgt_diag.reading import is_locked
from pgt_diag.resuming import resume_point
from pgt_diag.sweep import making
from pgt_diag.sweep.status import State
from reports.sprites import channel_states, sprite
from reports.summary import summarise
from tests.loops import small_net, train_steps
from tests.sweeps import rows_of


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_after_a_mistake_the_corrected_call_records(tmp_path: Path) -> None:
    model = small_net()
    for wrong in (None, "sgd", model):
        with pytest.raises(ConfigurationError, match=r"optimizer is .*torch\.optim\.Optimizer"):
            pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=wrong)
    assert not (tmp_path / "run").exists(), "the directory comes last"
    assert not model._forward_hooks
    optimizer = sgd(model)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer)
    assert pgt_diag.load_run(tmp_path / "run").iteration_count == 3


@pytest.mark.parametrize("failing", ["write run.json", "hook the optimizer"])
def test_whatever_fails_at_the_start_keeps_nobody_out_and_leaves_no_hook(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_net()
    optimizer = sgd(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        if failing == "hook the optimizer":
            patch.setattr(optimizer, "register_step_post_hook", fail)
        else:
            patch.setattr(RunDirectory, "update", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    assert not is_locked(tmp_path / "run")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer).close()


def test_a_directory_that_is_taken_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer).close()
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not is_locked(tmp_path / "run")


def test_a_resume_that_does_not_fit_keeps_nobody_out(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as first:
        train_steps(model, optimizer)
        state = first.state_dict()
    bad = {**state, "encoder": {**state["encoder"], "initial_norms": torch.zeros(3)}}
    with pytest.raises(ValueError, match="not of 11 filters"):
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, resume=bad)
    assert not is_locked(tmp_path / "run")
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, resume=state):
        train_steps(model, optimizer)
    assert pgt_diag.load_run(tmp_path / "run").iteration_count == 6


def test_a_run_that_appears_between_the_look_and_the_lock_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunDirectory.lock

    def late(self: RunDirectory) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "lock", lock)
            other = RunDirectory.create(tmp_path / "run", info={"status": "running"})
            other.finish("finished")
        lock(self)

    monkeypatch.setattr(RunDirectory, "lock", late)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path / "run")
    assert pgt_diag.load_run(tmp_path / "run").status == "finished"
    assert not is_locked(tmp_path / "run")


def test_a_lock_that_the_file_system_refuses_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(37, "No locks available")

    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with monkeypatch.context() as patch:
        patch.setattr(directory.fcntl, "flock", refuse)
        with pytest.raises(RunDirectoryError, match="No locks available"):
            RunDirectory.create(tmp_path / "run")
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_sweep_does_not_wait_for_a_row_that_it_failed_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no luck")

    looks = iter(range(3))

    def stop() -> bool:
        assert next(looks, None) is not None, "it waits for itself"
        return False

    monkeypatch.setattr(RunDirectory, "update", fail)
    monkeypatch.setattr(making, "_LOOK_SECONDS", 0.0)
    [row] = making.make_rows(rows_of(), tmp_path, stop=stop)
    assert (row.state, row.message) == (State.FAILED, "no luck")


def test_a_training_that_fails_before_its_first_step_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [row] = rows_of(epochs=1)
    looks = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        training.train(row.config, tmp_path / "run", stop=lambda: next(looks))

    def fail(*_: Any) -> None:
        raise RunDirectoryError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(training.checkpoint, "set_aside_newer", fail)
        with pytest.raises(RunDirectoryError, match="no luck"):
            training.train(row.config, tmp_path / "run", resume=resume_point(tmp_path / "run"))
    assert not is_locked(tmp_path / "run")
    training.train(row.config, tmp_path / "run", resume=resume_point(tmp_path / "run"))
    assert pgt_diag.load_run(tmp_path / "run").status == "finished"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("record_every", 0),
        ("record_every", -3),
        ("record_every", 2.5),
        ("record_every", True),
        ("record_every", "auto"),
        ("min_spell", 0),
        ("min_spell", -5),
        ("min_spell", None),
        ("collapsed_ratio", math.nan),
        ("collapsed_ratio", -0.1),
        ("collapsed_ratio", "0.1"),
        ("zeroed_ratio", math.nan),
        ("zeroed_ratio", math.inf),
        ("zeroed_ratio", 2),
        ("gap_module", ""),
        ("gap_module", 4),
        ("gap_module", ("1", 0)),
        ("gap_module", ["1", "3"]),
        ("taps", {"2": ""}),
        ("taps", {"2": ("3", 1.5)}),
        ("taps", {"2": None}),
        ("taps", ["3"]),
        ("info", {"status": "done"}),
        ("info", {"command": "python train.py"}),
        ("info", {"config": {"hidden": 3}}),
        ("info", {1: 2}),
        ("info", {"note": {(1, 2): 3}}),
        ("info", ["note"]),
        ("resume", 5),
        ("resume", {}),
    ],
)
def test_an_argument_that_cannot_be_is_refused_at_the_call(
    argument: str, value: Any, tmp_path: Path
) -> None:
    model = small_net()
    with pytest.raises(ValueError, match=f"{argument}|no module ''|state is of"):
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=sgd(model), **{argument: value})
    assert not (tmp_path / "run").exists()
    assert not model._forward_hooks


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    model = small_net()
    options: Any = {"record_every": np.int64(2), "collapsed_ratio": np.float32(0.5)}
    optimizer = sgd(model)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, **options):
        train_steps(model, optimizer)
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.weight_norms("0").index.tolist() == [0, 2]
    assert run.info["collapsed_ratio"] == 0.5


def test_what_cannot_be_attached_to_is_named(tmp_path: Path) -> None:
    model = small_net()
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    for wrong, named in ((None, "model is None"), (lazy, "lazy layers")):
        with pytest.raises(ConfigurationError, match=named):
            pgt_diag.FilterRecorder(wrong, tmp_path / "run", optimizer=sgd(model))
    with pytest.raises(ConfigurationError, match="directory is None"):
        pgt_diag.FilterRecorder(model, None, optimizer=sgd(model))


@pytest.mark.parametrize(
    ("call", "values", "message"),
    [
        ("log", {"loss": "0.5"}, "loss is '0.5'"),
        ("log", {"loss": torch.ones(2)}, "loss has shape"),
        ("log", {"accuracy": [1.0]}, "accuracy is"),
        ("log", {"clip_factors": {"2": torch.ones(1)}}, r"clip_factors\['2'\] has shape \(1,\)"),
        ("log", {"gradient_norms": {"2": [1.0] * 5}}, r"gradient_norms\['2'\] is no tensor"),
        ("log_epoch", {"values": {}}, "0 entries"),
        ("log_epoch", {"values": {"train_loss": "low"}}, "train_loss is 'low'"),
        ("log_epoch", {"values": {"test_accuracy": True}}, "test_accuracy is True"),
        ("log_epoch", {"values": {"epoch": -1}}, "epoch is -1"),
        ("log_epoch", {"values": {"epoch": math.nan}}, "epoch is nan"),
        ("log_epoch", {"values": {"epoch": 0, "new": 1}}, "has 'new'"),
        ("log_epoch", {"values": {"train_loss": 1.0}}, "epoch is None"),
        ("update_info", {"values": {"layers": []}}, "has 'layers'"),
        ("update_info", {"values": {"bad_images": 3}}, "'bad_images' is '3'"),
    ],
)
def test_what_is_told_to_a_recorder_is_checked_when_it_is_told(
    call: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = small_net()
    optimizer = sgd(model)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        first = {"epoch": 0, "train_loss": torch.tensor(0.5), "test_accuracy": 1, "note": "a"}
        recorder.log_epoch(first)
        train_steps(model, optimizer)
        with pytest.raises(ConfigurationError, match=message):
            getattr(recorder, call)(**values)
        train_steps(model, optimizer)
        recorder.log_epoch({"epoch": 1, "train_loss": np.float32(0.25), "note": None})
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.iteration_count == 6
    assert run.metrics["train_loss"].tolist() == [0.5, 0.25]
    for late in (recorder.log_epoch, recorder.update_info):
        with pytest.raises(RecorderError, match="the recorder is closed"):
            late({"epoch": 2})


def test_an_unknown_window_is_no_window() -> None:
    run = object.__new__(pgt_diag.Run)
    run._by_name = {"a": None}
    with pytest.raises(ValueError, match="no window 'maximum'; choose one of min, max"):
        run.weight_norms("a", window="maximum")


def test_the_functions_refuse_what_they_cannot_compute() -> None:
    p = torch.tensor([[0.5, 0.5]])
    calls: list[tuple[Callable[..., Any], str]] = [
        (lambda: pgt_diag.load_run(None), "path is None"),
        (lambda: pgt_diag.power_grad_transform(p, None), "alpha is None"),
        (lambda: pgt_diag.stationary_threshold(p, math.nan), "alpha is nan"),
        (lambda: power_grad_gradient_reference(p, p, 2), "alpha is 2"),
        (lambda: pgt_diag.PowerGradCrossEntropyLoss(alpha="0.5"), "alpha is 0.5"),
        (lambda: pgt_diag.PowerGradCrossEntropyLoss(ignore_index=1.5), "ignore_index is 1.5"),
        (lambda: pgt_diag.power_grad_cross_entropy(p, p, 0.5, label_smoothing=-1), "smoothing"),
    ]
    for call, message in calls:
        with pytest.raises(ConfigurationError, match=message):
            call()


def picture(count: int = 2) -> dict[str, Any]:
    return {
        "images": torch.randn(count, 3, 10, 10),
        "originals": torch.zeros(count, 3, 10, 10, dtype=torch.uint8),
        "labels": ["a"] * count,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": 2}, "layer is 2; there are 2 convolutions"),
        ({"layer": -1}, "layer is -1"),
        ({"layer": "0"}, "layer is '0'"),
        ({"images": None}, "images is None"),
        ({"originals": torch.zeros(2, 3, 10, 10)}, "originals is a tensor .* of float32"),
        ({"originals": torch.zeros(2, 1, 10, 10, dtype=torch.uint8)}, "originals is a tensor"),
        ({"labels": ["a"]}, "2 images, 2 originals and 1 labels"),
        (picture(0), "0 images"),
    ],
)
def test_a_snapshot_that_could_not_be_read_is_refused(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = small_net()
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=sgd(model)) as recorder:
        with pytest.raises(ConfigurationError, match=message):
            recorder.snapshot(**{"layer": 0, **picture(), **wrong})
        recorder.snapshot(0, **picture())
    assert len(pgt_diag.load_run(tmp_path / "run").feature_maps) == 1


def test_maps_of_another_dimension_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=sgd(model)) as recorder:
        images = {**picture(), "images": torch.randn(2, 3, 10)}
        with pytest.raises(ConfigurationError, match=r"maps of '0' have shape \(2, 4, 8\)"):
            recorder.snapshot(0, **images)
    assert pgt_diag.load_run(tmp_path / "run").feature_maps == ()


def test_layers_have_snapshots_of_their_own_at_one_iteration(tmp_path: Path) -> None:
    model = small_net()
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=sgd(model)) as recorder:
        recorder.snapshot(1, **picture())
        recorder.snapshot(0, **picture())
        with pytest.raises(ConfigurationError, match="iteration 0 has a snapshot of '0' already"):
            recorder.snapshot(0, **picture())
    run = pgt_diag.load_run(tmp_path / "run")
    assert [(each.iteration, each.layer) for each in run.feature_maps] == [(0, "0"), (0, "2")]


def test_a_picture_of_feature_maps_is_of_one_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    with torch.no_grad():
        model[2].weight[1], model[2].bias[1] = 0, -1
    optimizer = sgd(model)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        recorder.snapshot(0, **picture())
        recorder.snapshot(1, **picture())
        model(torch.randn(2, 3, 6, 6)).sum().backward()
        optimizer.step()
        recorder.snapshot(1, **picture())
    [summary] = summarise([pgt_diag.load_run(tmp_path / "run")])
    shown, states = sprite(summary), channel_states(summary)
    assert shown is not None
    assert (shown.layer, shown.iterations) == ("2", (0, 1))
    assert len(states) == 2 * 2 * 4
    assert states.loc[states["channel"] == 1, "zero"].all()
