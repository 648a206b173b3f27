"""A resumed run is the undisturbed run, to the bit; what cannot be resumed is told in one line."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pgt_diag
from commands.app import main
from pgt_diag import checkpoint, progress, training
from pgt_diag.config import DatasetName, Device, Method, Norm, RunConfig
from pgt_diag.errors import ConfigurationError, RunDirectoryError
from pgt_diag.progress import Listener, Progress
from pgt_diag.resuming import resume_point
from tests.crash import MODEL, register_net
from tests.loops import batches, small_net
from tests.runs import being_written, contents, difference, edit

register_net()
CONFIG = RunConfig(
    dataset=DatasetName.SYNTHETIC,
    synthetic_images=96,  # 12 iterations an epoch, and 3 test batches
    image_size=14,
    model=MODEL,
    norm=Norm.BATCH,
    batch_size=8,
    epochs=2,
    warmup_epochs=0.5,
    lr=0.05,
    min_spell=3,
    record_every=4,
    feature_map_snapshots=4,
    checkpoint_every=5,
    device=Device.CPU,
    threads=1,
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing: no power goes here, and the waiting is most of the time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


class Crash(Listener):
    """Fails after an iteration, before its checkpoint."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def iterated(self, progress: Progress) -> None:
        if progress.iteration == self.iteration:
            raise ZeroDivisionError


def stop_after(calls: int) -> Callable[[], bool]:
    answers = iter([False] * (calls - 1))
    return lambda: next(answers, True)


def stopped(config: RunConfig, run: Path, calls: int) -> None:
    """Stop a run: `stop` is asked after every iteration, and after every test batch."""
    with pytest.raises(KeyboardInterrupt):
        training.train(config, run, stop=stop_after(calls))


def resumed(config: RunConfig, run: Path, **options: Any) -> None:
    torch.manual_seed(99)  # a new process has another state of the generator than the one before
    training.train(config, run, resume=resume_point(run), **options)


def expect_same(config: RunConfig, run: Path, undisturbed: Path) -> None:
    training.train(config, undisturbed)
    assert difference(contents(run), contents(undisturbed)) is None


VARIANTS: dict[str, dict[str, Any]] = {
    **{method.value: {"method": method} for method in Method},
    "accumulation": {"accumulate": 2, "method": Method.GC_PGT},
    "label smoothing": {"label_smoothing": 0.1, "method": Method.PGT},
    "no batch norm": {"norm": Norm.NONE, "lr": 0.01},
    "norms stored at will": {"record_every": None},
    "norms stored every third time": {"record_every": 3},
    "every spell": {"min_spell": 1, "nesterov": False},
    "augmentation": {"augment": "small"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_and_crashed_within_epochs_is_resumed_to_the_bit(
    variant: str, tmp_path: Path
) -> None:
    config, run = dataclasses.replace(CONFIG, **VARIANTS[variant]), tmp_path / "run"
    stopped(config, run, 7)
    with pytest.raises(ZeroDivisionError):
        resumed(config, run, listener=Crash(14))
    assert pgt_diag.load_run(run).iteration_count == 14
    resumed(config, run)
    assert pgt_diag.load_run(run).info["resumed_from"] == [7, 10]
    expect_same(config, run, tmp_path / "undisturbed")


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", Method)
def test_a_run_stopped_anywhere_is_resumed_to_the_bit(
    method: Method, accumulate: int, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, method=method, accumulate=accumulate)
    undisturbed = contents(training.train(config, tmp_path / "undisturbed"))
    for calls in range(1, 31):
        run = tmp_path / f"run-{calls}"
        stopped(config, run, calls)
        resumed(config, run)
        assert difference(contents(run), undisturbed) is None, calls


@pytest.mark.parametrize("calls", [1, 12, 13, 15, 16, 27, 30])
def test_a_run_stopped_at_an_epochs_ends_and_in_evaluation_is_resumed_to_the_bit(
    calls: int, tmp_path: Path
) -> None:
    stopped(CONFIG, tmp_path / "run", calls)
    resumed(CONFIG, tmp_path / "run")
    expect_same(CONFIG, tmp_path / "run", tmp_path / "undisturbed")


def test_an_epoch_stopped_in_its_evaluation_keeps_the_time_of_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ticks = tmp_path / "run", itertools.count()
    # A clock that goes on by a second whenever it is looked at: once after each iteration.
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))

    def saved() -> float:
        return float(checkpoint.load(checkpoint.found_in(run)[0])["meter"]["epoch_seconds"])

    stopped(CONFIG, run, 7)
    first_half = saved()
    assert first_half >= 7
    with pytest.raises(KeyboardInterrupt):
        resumed(CONFIG, run, stop=stop_after(6))  # in the evaluation after the other 5
    whole = saved()
    assert first_half + 5 <= whole <= first_half + 8
    resumed(CONFIG, run)
    epoch = pgt_diag.load_run(run).metrics.iloc[0]
    assert whole <= epoch["seconds"] <= whole + 2
    assert epoch["images_per_second"] == pytest.approx(96 / epoch["seconds"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of JPEG images, one of them broken."""
    root = tmp_path_factory.mktemp("pictures")
    dice = np.random.default_rng(3)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("cat", "dog", "emu"):
            for index in range(count):
                path = root / split / name / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = dice.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    (root / "train" / "dog" / "5.jpg").write_bytes(b"no picture")
    return root


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0)])
def test_augmented_images_are_the_same_after_a_resume_for_any_number_of_workers(
    before: int, after: int, pictures: Path, tmp_path: Path
) -> None:
    folder = {"dataset": DatasetName.IMAGEFOLDER, "data": str(pictures), "bad_images": "skip"}
    config = dataclasses.replace(CONFIG, **folder, epochs=3, checkpoint_every=None)
    run = tmp_path / "run"
    stopped(dataclasses.replace(config, workers=before), run, 9)
    config = dataclasses.replace(config, workers=after)
    resumed(config, run)
    expect_same(config, run, tmp_path / "undisturbed")


# What is found damaged


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """Return a run that crashed at iteration 14, after the checkpoints of 5 and 10."""
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        training.train(CONFIG, run, listener=Crash(14))
    return run


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def command(run: Path, *more: str, resume: str = "--resume") -> int:
    return main(["train", "--run-dir", str(run), resume, *more])


def test_the_older_checkpoint_is_used_when_the_newest_is_damaged(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint.found_in(interrupted)[0]
    damage(newest)
    again = pgt_diag.load_run(interrupted).iteration_count - 5
    assert again > 1
    assert command(interrupted) == 0
    output = capsys.readouterr().out
    assert "going on from iteration 5 of 24, epoch 1 of 2; " in output
    assert f"the {again} iterations recorded since that checkpoint are made again" in output
    assert newest.name in output.replace("\n", "")
    assert (interrupted / "set-aside" / "checkpoints" / newest.name).exists()
    expect_same(CONFIG, interrupted, tmp_path / "undisturbed")


def test_a_trace_damaged_before_every_checkpoint_is_told_and_not_resumed(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = min((interrupted / "trace").iterdir())
    damage(part)
    before = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    assert command(interrupted) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert part.name in line
    assert "--force" in line
    after = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    assert after == before


def test_a_trace_damaged_between_the_checkpoints_costs_the_newest_one(tmp_path: Path) -> None:
    run = tmp_path / "run"

    class Copy(Listener):
        """Keeps the run as a kill after iteration 14 would leave it, its parts not merged."""

        def iterated(self, progress: Progress) -> None:
            if progress.iteration == 14:
                shutil.copytree(tmp_path / "going on", run)

    training.train(CONFIG, tmp_path / "going on", listener=Copy())
    parts = sorted((run / "iterations").iterdir())
    between = next(part for part in parts if int(part.name.split("-")[1]) == 5)
    damage(between)
    point = resume_point(run)
    assert point.checkpoint is not None
    assert point.checkpoint.name.split("-")[1] == f"{5:012}"
    assert any(between.name in problem for problem in point.damaged)
    resumed(CONFIG, run)
    expect_same(CONFIG, run, tmp_path / "undisturbed")


def test_a_damaged_run_json_is_restored_from_the_checkpoint(
    interrupted: Path, tmp_path: Path
) -> None:
    (interrupted / "run.json").write_bytes(b"{")
    resumed(CONFIG, interrupted)
    expect_same(CONFIG, interrupted, tmp_path / "undisturbed")
    info = pgt_diag.load_run(interrupted).info
    assert info["command"] is None
    assert info["created"]


def test_a_damaged_metrics_file_is_restored_from_the_checkpoint(
    interrupted: Path, tmp_path: Path
) -> None:
    damage(interrupted / "metrics.csv")
    resumed(CONFIG, interrupted)
    expect_same(CONFIG, interrupted, tmp_path / "undisturbed")


def test_what_was_recorded_after_the_checkpoint_is_set_aside(interrupted: Path) -> None:
    [before] = (interrupted / "feature_maps").glob("iteration-000000000011-*")
    resumed(CONFIG, interrupted)
    [aside] = (interrupted / "set-aside").iterdir()
    for name in ("iterations", "events", "trace"):
        assert list((aside / name).iterdir()), name
    assert list(aside.glob("metrics*.csv"))
    assert (aside / "feature_maps" / before.name).exists()


# What can be resumed and what cannot


def test_a_changed_option_is_refused_by_name(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, key in (("--lr=0.1", "lr"), ("--method=gc", "method"), ("--seed=1", "seed")):
        assert command(interrupted, option) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{key} is " in line
    assert command(interrupted, "--force") == 2


def test_how_often_to_save_may_change(interrupted: Path, tmp_path: Path) -> None:
    assert command(interrupted, "--checkpoint-every=3") == 0
    config = dataclasses.replace(CONFIG, checkpoint_every=3)
    expect_same(config, interrupted, tmp_path / "undisturbed")


def options(config: RunConfig) -> list[str]:
    names = ("dataset", "synthetic_images", "image_size", "model", "norm", "batch_size", "epochs",
             "warmup_epochs", "lr", "min_spell", "record_every", "feature_map_snapshots",
             "checkpoint_every", "device", "threads")  # fmt: skip
    return [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]


def test_auto_starts_a_run_where_there_is_none_and_a_finished_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command(run) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "no run here" in line
    assert command(run, *options(CONFIG), resume="--resume=auto") == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for resume in ("--resume", "--resume=auto"):
        capsys.readouterr()
        assert command(run, resume=resume) == 0
        assert "already finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    class Early(Listener):
        def started(self, plan: object) -> None:
            raise ZeroDivisionError

    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        training.train(CONFIG, run, listener=Early())
    resumed(CONFIG, run)
    expect_same(CONFIG, run, tmp_path / "undisturbed")


def test_a_diverged_run_is_not_repeated(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(interrupted, status="diverged")
    assert command(interrupted) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "diverged" in line


def test_a_run_that_is_being_written_is_left_alone(interrupted: Path) -> None:
    with being_written(interrupted), pytest.raises(RunDirectoryError, match="is being written"):
        resume_point(interrupted)


# Somebody's own loop


def recorded(
    run: Path, steps: range, *, save_at: int | None = None, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train `small_net`; return what a loop saves at a step."""
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    file = run.with_suffix(".pt")
    resume = state["recorder"] if state else None
    with pgt_diag.FilterRecorder(
        model, run, optimizer=optimizer, record_every=3, min_spell=2, resume=resume
    ) as recorder:
        for step, (images, target) in zip(
            steps, islice(batches(steps.stop, side=14), steps.start, None), strict=True
        ):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            recorder.log(loss=loss)
            loss.backward()
            optimizer.step()
            if step + 1 == save_at:
                saved = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "recorder": recorder.state_dict(),
                }
                torch.save(saved, file)
        if save_at is not None:
            recorder.close("interrupted")
            loaded: dict[str, Any] = torch.load(file, weights_only=True)
            return loaded
    return {}


def tables(run: Path) -> Sequence[Any]:
    loaded = pgt_diag.load_run(run)
    each = [loaded.weight_norms(layer.name, "min") for layer in loaded.layers]
    more = [loaded.gradient_norms(layer.name, "max") for layer in loaded.layers]
    counts = [loaded.state_counts(kind) for kind in ("silent", "zero_gradient")]
    return [loaded.iterations, loaded.events, loaded.brief_spells, *each, *more, *counts]


@pytest.mark.parametrize("save_at", [1, 7, 12])
def test_a_recorder_in_an_own_loop_goes_on_from_its_state(save_at: int, tmp_path: Path) -> None:
    recorded(tmp_path / "undisturbed", range(17))
    state = recorded(tmp_path / "run", range(14), save_at=save_at)
    recorded(tmp_path / "run", range(save_at, 17), state=state)
    pairs = zip(tables(tmp_path / "run"), tables(tmp_path / "undisturbed"), strict=True)
    assert all(found.equals(wanted) for found, wanted in pairs)
    assert pgt_diag.load_run(tmp_path / "run").status == "finished"


def test_a_recorders_state_fits_its_own_model_and_settings_only(tmp_path: Path) -> None:
    state = recorded(tmp_path / "run", range(5), save_at=3)["recorder"]
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    with pytest.raises(ConfigurationError, match=r"other settings: .*min_spell"):
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, resume=state)
    del model[2:4]
    with pytest.raises(ConfigurationError, match="other layers"):
        pgt_diag.FilterRecorder(
            model, tmp_path / "run", optimizer=optimizer, record_every=3, min_spell=2, resume=state
        )
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == before
