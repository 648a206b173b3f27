"""Runs that go on, and sweeps whose rows follow, where the data is no longer what it was."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pgt_diag
from commands.app import main
from pgt_diag import checkpoint, training
from pgt_diag.config import DatasetName, Device, RunConfig
from pgt_diag.errors import DataError
from pgt_diag.resuming import resume_point
from pgt_diag.schedules import learning_rate
from pgt_diag.sweep.making import make_row, make_rows
from pgt_diag.sweep.status import State
from tests.crash import MODEL, register_net
from tests.runs import contents, difference
from tests.sweeps import Stop, options, rows_of

register_net()
BATCH, EPOCHS = 3, 3
COUNT = 18  # training images: 6 iterations an epoch


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 14, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=50 + seed % 50)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder of two classes, 9 training and 3 test images of each."""
    for split, count in (("train", COUNT // 2), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                draw(tmp_path / "data" / split / name / f"{number}.jpg", 100 * label + number)
    return tmp_path / "data"


@pytest.fixture
def config(data: Path) -> RunConfig:
    return RunConfig(
        dataset=DatasetName.IMAGEFOLDER,
        data=str(data),
        model=MODEL,
        image_size=14,
        batch_size=BATCH,
        epochs=EPOCHS,
        warmup_epochs=0.5,
        lr=0.01,
        workers=0,
        device=Device.CPU,
        threads=1,
        feature_map_snapshots=2,
    )


def stopped(config: RunConfig, run: Path, calls: int, **more: Any) -> None:
    """Stop a run; it asks after every iteration and after every test batch."""
    with pytest.raises(KeyboardInterrupt):
        training.train(config, run, stop=Stop(calls - 1), **more)


def resumed(config: RunConfig, run: Path, **more: Any) -> pgt_diag.run.Run:
    training.train(config, run, resume=resume_point(run), **more)
    return pgt_diag.load_run(run)


def remove_three(data: Path) -> None:
    for name in ("cat/0.jpg", "cat/4.jpg", "dog/8.jpg"):
        (data / "train" / name).unlink()


def add_six(data: Path) -> None:
    for number in range(20, 26):
        draw(data / "train" / "cat" / f"{number}.jpg", number)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (remove_three, r"3 images removed \('cat/0.jpg', 'cat/4.jpg', 'dog/8.jpg'\);"),
    "added": (add_six, r"6 images added \('cat/20.jpg', .* and 3 more\);"),
    "edited": (lambda data: draw(data / "train/cat/1.jpg", 999), "1 image of another size"),
    "swapped": (
        lambda data: swap(data / "train/cat/1.jpg", data / "train/dog/1.jpg"),
        r"2 images of another size \('cat/1.jpg', 'dog/1.jpg'\)",
    ),
    "renamed": (
        lambda data: (data / "train/cat/1.jpg").rename(data / "train/cat/one.jpg"),
        r"1 image removed \('cat/1.jpg'\), 1 image added \('cat/one.jpg'\)",
    ),
}


def swap(one: Path, two: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def unchanged(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", CHANGES)
def test_another_training_set_is_refused_with_what_changed(
    kind: str, config: RunConfig, data: Path, tmp_path: Path
) -> None:
    change, told = CHANGES[kind]
    run = tmp_path / "run"
    stopped(config, run, 4)
    before = unchanged(run)
    change(data)
    with pytest.raises(DataError, match=f"^the training set is not that of the run in .*{told}"):
        resumed(config, run)
    with pytest.raises(DataError, match=told):
        training.plan(config, run, resume=resume_point(run))
    assert unchanged(run) == before


@pytest.mark.parametrize(
    ("change", "stop", "each", "planned"),
    [
        (remove_three, 4, 5, 4 + 1 + 5 + 5),  # in an epoch that has less left than it had
        (remove_three, 6, 5, 6 + 0 + 5 + 5),  # in one that is over by now
        (add_six, 4, 8, 4 + 4 + 8 + 8),
        (remove_three, 6 + 2 + 4, 5, 10 + 1 + 5),  # in the second epoch, after two test batches
        (CHANGES["edited"][0], 4, 6, 18),
    ],
)
def test_what_is_accepted_is_recorded_and_every_number_is_of_what_was_seen(
    change: Callable[[Path], object],
    stop: int,
    each: int,
    planned: int,
    config: RunConfig,
    data: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    stopped(config, run, stop)
    done = pgt_diag.load_run(run).iteration_count
    change(data)
    plan = training.plan(config, run, resume=resume_point(run), accept_changed_data=True)
    assert plan.iterations == planned
    loaded = resumed(config, run, accept_changed_data=True)
    info = loaded.info
    assert (loaded.status, loaded.iteration_count) == ("finished", planned)
    assert (info["planned_iterations"], info["iterations_per_epoch"]) == (planned, each)
    assert info["data"]["train_images"] == len(list((data / "train").rglob("*.jpg")))
    [recorded] = info["changed_data"]
    assert recorded["iteration"] == done
    assert recorded["train"] in plan.notes[-1]
    # Each epoch's means are those of its iterations, as the recorder has them.
    ends = loaded.metrics["iteration"].tolist()
    assert len(ends) == EPOCHS
    assert ends[-1] == planned
    starts = [0, *ends[:-1]]
    for row, start, end in zip(loaded.metrics.to_dict("records"), starts, ends, strict=True):
        seen = loaded.iterations.iloc[start:end]
        assert row["train_loss"] == pytest.approx(seen["loss"].mean(), rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(seen["accuracy"].mean(), rel=1e-5)
        assert row["images_per_second"] == pytest.approx((end - start) * BATCH / row["seconds"])
    # The learning rate goes by epochs, and ends where it does for any number of iterations.
    tail = [learning_rate(config, each * EPOCHS - 1 - back, each) for back in range(each)]
    assert loaded.iterations["lr"].tolist()[: -each - 1 : -1] == pytest.approx(tail, rel=1e-6)


def test_an_accepted_change_is_accepted_once(config: RunConfig, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(config, run, 4)
    remove_three(data)
    accepted = {"resume": resume_point(run), "accept_changed_data": True}
    stopped(config, run, 4, **accepted)  # another iteration, and two test batches on
    stopped(config, run, 2, resume=resume_point(run))
    loaded = resumed(config, run)
    assert len(loaded.info["changed_data"]) == 1
    assert loaded.iteration_count == loaded.info["planned_iterations"] == 4 + 1 + 5 + 5
    add_six(data)
    assert len(json.loads((run / "run.json").read_text())["changed_data"]) == 1


def test_another_test_set_is_noted_and_recorded(
    config: RunConfig, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stopped(config, run, 4)
    (data / "val" / "cat" / "0.jpg").unlink()
    assert main(["train", f"--run-dir={run}", "--resume"]) == 0
    assert (
        "the test set has changed, and test accuracies so far are of the earlier"
        in capsys.readouterr().out
    )
    info = pgt_diag.load_run(run).info
    assert info["changed_data"] == [{"iteration": 4, "test": "1 image removed ('cat/0.jpg')"}]
    assert info["data"]["test_images"] == 5
    assert info["planned_iterations"] == 18


def test_other_classes_are_refused_whatever_is_accepted(
    config: RunConfig, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped(config, run, 4)
    for split in ("train", "val"):
        (data / split / "dog").rename(data / split / "emu")
    for accept in (False, True):
        with pytest.raises(DataError, match=r"2 then, 2 now, 'dog' is gone, 'emu' is new; put"):
            resumed(config, run, accept_changed_data=accept)


def test_the_same_data_in_another_place_is_the_same(
    config: RunConfig, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped(config, run, 4)
    shutil.copytree(data, tmp_path / "copy")
    shutil.rmtree(data)
    moved = dataclasses.replace(config, data=str(tmp_path / "copy"))
    assert "changed_data" not in resumed(moved, run).info
    training.train(moved, tmp_path / "undisturbed")
    assert difference(contents(run), contents(tmp_path / "undisturbed")) is None


def as_of_an_earlier_version(run: Path) -> None:
    """Take out of a run's checkpoint and run.json what earlier versions did not write."""
    [newest, *_] = checkpoint.found_in(run)
    state = checkpoint.load(newest)
    del state["data"], state["position"]["extra"]
    info = json.loads(state["recorder"]["directory"]["info"])
    del info["data"]["train_digest"], info["data"]["test_digest"]
    state["recorder"]["directory"]["info"] = json.dumps(info)
    shutil.rmtree(newest.parent)
    checkpoint.save(run, state["recorder"]["steps"], state)


def test_a_run_of_an_earlier_version_goes_on_and_counts_are_compared(
    config: RunConfig, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped(config, run, 4)
    as_of_an_earlier_version(run)
    remove_three(data)
    with pytest.raises(DataError, match="18 images then, and 15 now"):
        resumed(config, run)
    for seed, name in enumerate(("cat/0.jpg", "cat/4.jpg", "dog/8.jpg")):
        draw(data / "train" / name, seed)
    assert resumed(config, run).status == "finished"


# On the command line


def test_the_command_names_the_option_and_the_note_says_what_was_accepted(
    config: RunConfig, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stopped(config, run, 4)
    remove_three(data)
    assert main(["train", f"--run-dir={run}", "--resume"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 images removed ('cat/0.jpg', 'cat/4.jpg', 'dog/8.jpg')" in line
    assert line.endswith("go on with it as it is: --accept-changed-data")
    assert main(["train", f"--run-dir={run}", "--resume", "--accept-changed-data"]) == 0
    assert "accepted and recorded: 3 images removed" in capsys.readouterr().out
    assert main(["watch", str(run), "--once"]) in (0, 2)


def test_without_a_resume_the_option_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--accept-changed-data"]) == 2
    assert "has no effect without --resume" in capsys.readouterr().err


# Sweeps


def rows(data: Path, **values: Any) -> Any:
    folder = {"dataset": "imagefolder", "data": str(data), "image_size": 32, "workers": 0}
    return rows_of(**{**folder, "batch_size": 6, "epochs": 1, "warmup_epochs": 0.0, **values})


def test_rows_that_follow_on_other_data_are_refused_unless_that_is_accepted(
    data: Path, tmp_path: Path
) -> None:
    first, second, third = rows(data, seed=[0, 1, 2])
    folder = tmp_path / "sweep"
    make_rows([first], folder)
    assert make_row(second, folder).state is State.FINISHED
    remove_three(data)
    for row in (third, second):
        if row is third:
            with pytest.raises(
                DataError, match=r"of the run in .*-s0-.*: .*`accept_changed_data=True`"
            ):
                make_rows([row], folder)
        else:  # finished rows stay as they are
            assert make_row(row, folder).state is State.FINISHED
    assert make_row(third, folder, accept_changed_data=True).state is State.FINISHED
    images = [pgt_diag.load_run(folder / row.name).info["data"]["train_images"]
              for row in (first, second, third)]  # fmt: skip
    assert images == [18, 18, 15]


def test_an_interrupted_row_is_compared_with_itself(data: Path, tmp_path: Path) -> None:
    [row] = rows(data, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        make_row(row, tmp_path, stop=Stop(2))
    remove_three(data)
    with pytest.raises(DataError, match="3 images removed"):
        make_row(row, tmp_path)
    assert make_row(row, tmp_path, accept_changed_data=True).state is State.FINISHED
    assert pgt_diag.load_run(tmp_path / row.name).info["changed_data"]


def test_the_option_reaches_rows_in_other_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    class Finished:
        returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command)

        def poll(self) -> int:
            return 0

        kill = wait = poll

    monkeypatch.setattr("subprocess.Popen", Finished)
    [row] = rows(data)
    for accept in (False, True):
        make_row(row, tmp_path, processes=2, accept_changed_data=accept)
    assert ["--accept-changed-data" in command for command in commands] == [False, True]


def test_slurms_tasks_get_the_option_and_the_data_is_compared_when_they_are_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"dataset": "imagefolder", "data": str(data), "image_size": 32, "workers": 0,
              "preset": "smoke", "batch_size": 6, "epochs": 1, "warmup_epochs": 0.0,
              "model": "squeezenet1_1", "device": "cpu", "threads": 1}  # fmt: skip
    folder, grid = tmp_path / "sweep", tmp_path / "empty.toml"
    grid.touch()
    command = ["sweep", f"--config={grid}", f"--sweep-dir={folder}"]
    assert main([*command, *options(values)]) == 0
    remove_three(data)
    more = [*options({**values, "seed": [0, 1]}), "--engine=slurm"]
    assert main([*command, *more]) == 3
    assert "18 images then, and 15 now" in capsys.readouterr().err
    assert main([*command, *more, "--accept-changed-data"]) == 0
    [rows_file] = folder.glob("rows-*.txt")
    [line] = rows_file.read_text().splitlines()
    assert line.endswith("--resume auto --accept-changed-data")
    shutil.rmtree(data)  # as on a machine that only submits
    assert main([*command, *more]) == 0
