"""What a person sees: the commands on real terminals of several widths, read back."""

import contextlib
import dataclasses
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from commands import sweep_console
from commands.app import main
from commands.console import TrainingConsole
from commands.terminal import between_words, fitted, packed
from pgt_diag import training
from pgt_diag.config import RunConfig
from pgt_diag.progress import Progress
from pgt_diag.run import load_run
from pgt_diag.sweep.grid import build_grid
from pgt_diag.sweep.status import RowStatus, State, write_plan
from reports.summary import summarise
from tests.runs import being_written, edit
from tests.screens import WIDTHS, broken_words, on_terminal

TINY = [
    "--dataset=synthetic", "--synthetic-images=32", "--image-size=16", "--batch-size=16",
    "--device=cpu", "--threads=1", "--epochs=3", "--warmup-epochs=0",
]  # fmt: skip
LONG = "a-folder-of-a-name-that-is-longer-than-a-terminal-is-wide/" * 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "baseline"
    assert main(["train", *TINY, f"--run-dir={path}"]) == 0
    return path


@pytest.fixture
def folder(recorded, tmp_path, monkeypatch):
    """A working directory with a run of its own."""
    shutil.copytree(recorded, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expect_whole(parts, screen):
    for part in parts:
        assert any(part in line for line in screen.text), (part, screen.text)


@pytest.mark.parametrize("width", WIDTHS)
def test_watch_shows_every_number_and_name_whole_and_leaves_no_fragments(width, folder):
    edit(folder / "run", status="running", planned_iterations=40)
    run = load_run(folder / "run")
    dead = summarise([run])[0].by_layer["dead"]
    with being_written(folder / "run"):
        screen, code = on_terminal(
            lambda: main(["watch", "run", "--interval=0.1"]), width, 24, typed={"of 40": b"\x03"}
        )
    assert code == 130
    expect_whole(
        ["iteration 6 of 40 (15.0 %)", f"loss {run.latest['loss']:.4f}", "images/s", " left",
         f"{dead.sum():,} of 4,800 filters dead"], screen,
    )  # fmt: skip
    rows = [line.split() for line in screen.text if re.match(r" +\d+ +\w", line)]
    assert len(rows) >= 3
    for index, name, count, *_ in rows:
        assert name == run.layers[int(index)].name and int(count) == dead[name]
    assert sum("run running" in line for line in screen.text) == 1
    assert "^C" not in "".join(screen.text)
    assert screen.text[-1] == "stopped watching; what is running goes on"


@pytest.mark.parametrize("width", WIDTHS)
def test_watch_follows_a_sweep_run_by_run(width, folder):
    rows = build_grid(None, {"preset": "smoke", "seed": [0, 1, 2]}).rows
    write_plan(rows, folder / "sweep")
    first, second, third = (row.name for row in rows)
    for name in (first, second):
        shutil.copytree("run", folder / "sweep" / name)
    edit(folder / "sweep" / second, status="running", planned_iterations=60)
    with being_written(folder / "sweep" / second):
        screen, code = on_terminal(
            lambda: main(["watch", "sweep", "--interval=0.1"]),
            width,
            typed={"1 running": b"\x03"},
        )
    assert code == 130
    expect_whole(["1 of 3 runs finished", "1 running", "1 to do", " left"], screen)
    text = "\n".join(screen.text)
    for name, state in ((first, "finished"), (second, "running"), (third, "to do")):
        assert re.search(rf"^ *{re.escape(name)} +{state}\b", text, re.M), text


def test_watch_ends_when_the_sweep_has_and_not_between_two_runs(folder, monkeypatch, capsys):
    rows = build_grid(None, {"preset": "smoke", "seed": [0, 1]}).rows
    write_plan(rows, folder / "sweep")
    first, second = (folder / "sweep" / row.name for row in rows)
    shutil.copytree("run", first)
    actions = [lambda: None, lambda: shutil.copytree("run", second)]
    monkeypatch.setattr(time, "sleep", lambda seconds: actions.pop(0)())
    assert main(["watch", "sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 2 runs finished · 1 to do · waiting for the next run")
    assert lines[-1].startswith("finished: 2 of 2 runs finished; next: pgt-diag report sweep")
    # A sweep that was stopped long ago is not waited for.
    shutil.rmtree(second)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    assert main(["watch", "sweep"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("ended: 1 of 2 runs finished, 1 to")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    values = {"dataset": "synthetic", "synthetic_images": 32, "epochs": 120, "batch_size": 16}
    config = RunConfig.from_mapping(values | {"model": "squeezenet1_1", "image_size": 32})
    return training.plan(config, tmp_path_factory.mktemp("plan") / "run")


def train_on_terminal(plan):
    """Say what a training run says, up to Ctrl-C."""
    epoch = dict.fromkeys(training.EPOCH_COLUMNS, 98.1234) | {"epoch": 0, "dead_filters": 1234}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = TrainingConsole(json_output=False, preset=None)
    with contextlib.suppress(KeyboardInterrupt), console:
        console.started(plan)
        console.iterated(Progress(0, 1, 1.2345, 98.7, 1234.5, 12345, 1512))
        console.finished_epoch(epoch)
        signal.raise_signal(signal.SIGINT)
    return 130


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("directory", ["runs/pgt-a0.25-digits-s0-20261129-101500", LONG])
def test_training_breaks_no_line_inside_a_word_nor_the_command_that_resumes(
    width, directory, plan, capsys
):
    plan = dataclasses.replace(plan, directory=Path(directory))
    directory = plan.directory
    train_on_terminal(plan)
    plain = capsys.readouterr().out
    screen, code = on_terminal(lambda: train_on_terminal(plan), width)
    assert code == 130
    command = f"pgt-diag train --run-dir {directory} --resume"
    assert plain.splitlines()[-1].endswith(f"go on with: {command}")
    # A terminal that is too narrow goes on in its next row, with no new line in between.
    rows = "".join(line.ljust(width) for line in screen.text)
    assert rows.rstrip().endswith(command)
    assert len(command) + 2 > width or command in screen.text[-1]
    assert broken_words(screen, plain.replace(command, "")) == []
    bar = next(line for line in screen.text if line.startswith("epoch 1/120 "))
    assert "3:25:45 left" in bar and bar.endswith("1512 dead")


@pytest.mark.parametrize("width", WIDTHS)
def test_show_breaks_no_word_and_leaves_columns_out_instead_of_mangling_them(
    width, recorded, capsys
):
    assert main(["show", str(recorded)]) == 0
    plain = capsys.readouterr().out
    screen, code = on_terminal(lambda: main(["show", str(recorded)]), width, 100)
    assert code == 0
    prose = "\n".join(line for line in plain.splitlines() if "  " not in line)
    assert broken_words(screen, prose) == []
    text = "\n".join(screen.text)
    (summary,) = summarise([load_run(recorded)])
    for layer, row in summary.by_layer.iterrows():
        assert re.search(rf"^ *{row['index']} +{layer} .*\b{row['dead']}\b", text, re.M)
    best = load_run(recorded).metrics["test_accuracy"].max()
    assert re.search(rf"^ +16 +Baseline .*\b{best:.2f}\b", text, re.M)
    assert ("Left out for want of room: " in text) == (width < 100)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_sweeps_plan_fits_its_terminal(width):
    rows = build_grid(None, {"preset": "smoke", "method": ["agc+pgt"], "seed": [0, 1]}).rows
    statuses = [RowStatus(row, State.INTERRUPTED, done=1234, planned=5678) for row in rows]

    def show():
        sweep_console._print_rows(statuses, {})
        return 0

    screen, _ = on_terminal(show, width)
    expect_whole([row.name for row in rows], screen)
    assert broken_words(screen, "interrupted at 1,234 of 5,678") == []


def test_a_mistake_is_told_without_a_broken_word():
    message = "pgt-diag: error: " + LONG.replace("/", " ") + "nowhere: no such directory"
    screen, code = on_terminal(lambda: main(["show", LONG.replace("/", " ") + "nowhere"]), 60)
    assert code == 3
    assert broken_words(screen, message) == []


def test_numbers_leave_a_line_whole():
    assert packed(["aaa", "bb", "c"], 8) == ["aaa · bb", "c"]
    assert fitted("loss 1, accuracy 9 %, 3 dead", 16, ("accuracy", "loss")) == "loss 1, 3 dead"
    assert fitted("loss 1, 3 dead", 5, ("accuracy", "loss")) == "3 dead"
    text = "one two three-four five"
    folded = between_words(text, 8)
    assert folded.split("\n") == ["one two", "three-four", "five"]
    assert folded.replace("\n", " ") == text
    assert between_words("漢字 漢字", 8) == "漢字\n漢字"
    assert between_words("name      one two", 14, indent=10) == "name      one\n          two"
