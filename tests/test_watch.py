"""`pgt-diag watch`: a run that goes on, stops, ends, or was killed."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands.app import main
from commands.terminal import duration, sparkline
from pgt_diag.run import load_run
from pgt_diag.sweep.grid import build_grid
from pgt_diag.sweep.status import PLAN_FILE, planned_names, write_plan
from reports.follow import Follower, LayerNow
from reports.summary import summarise
from tests.runs import being_written, edit

ROOT = Path(__file__).parent.parent
TINY = [
    "--dataset=synthetic", "--synthetic-images=32", "--image-size=16", "--batch-size=16",
    "--device=cpu", "--threads=1", "--epochs=6", "--warmup-epochs=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "baseline"
    assert main(["train", *TINY, f"--run-dir={path}"]) == 0
    return path


@pytest.fixture
def run(recorded, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(recorded, path)
    return path


@pytest.fixture
def running(run):
    edit(run, status="running", planned_iterations=40)
    with being_written(run):
        yield run


def touch(path, written):
    """Change when the directory was last written to."""
    for place in path.iterdir():
        os.utime(place, (written, written))


def test_a_snapshot_says_what_the_run_directory_says(run):
    snapshot = Follower(run).look(time.time())
    summary = summarise([load_run(run)])[0]
    assert (snapshot.status, snapshot.iterations, snapshot.planned) == ("finished", 12, 12)
    assert snapshot.loss == pytest.approx(summary.run.iterations["loss"].iloc[-1])
    assert snapshot.dead == summary.dead
    assert [layer.dead for layer in snapshot.layers] == summary.by_layer["dead"].tolist()
    assert all(layer.history[-1] == layer.dead for layer in snapshot.layers)
    assert not snapshot.stalled


def test_the_rate_is_the_one_seen_and_the_time_left_follows(running):
    run = running
    touch(run, 1000.0)
    part = next((run / "iterations").iterdir())
    follower = Follower(run)
    whole = part.read_bytes()
    hidden = run / "hidden"
    shutil.move(part, hidden)
    os.utime(run / "iterations", (1000, 1000))
    first = follower.look(1000.0)
    assert (first.iterations, first.seconds_left, first.layers) == (0, None, ())
    part.write_bytes(whole)
    os.utime(run / "iterations", (1006, 1006))
    second = follower.look(1007.0)
    assert second.iterations_per_second == pytest.approx(2.0)
    assert second.images_per_second == pytest.approx(32.0)
    assert second.seconds_left == pytest.approx(14.0)
    assert second.silent_for == pytest.approx(1.0)


def test_a_first_look_takes_the_rate_from_the_epochs(running):
    touch(running, 1000.0)
    snapshot = Follower(running).look(1001.0)
    epochs = load_run(running).metrics["images_per_second"].tail(3).median()
    assert snapshot.images_per_second == pytest.approx(epochs)


def test_a_run_that_hangs_is_not_said_to_go_on(running, capsys):
    touch(running, time.time() - 500)
    assert Follower(running).look(time.time()).stalled
    assert main(["watch", str(running), "--once"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("iteration 12 of 40 (30.0 %)")
    assert re.search(r"no new data since 5\d\d s", line)
    assert "left" not in line and "images/s" not in line


def test_a_killed_run_is_known_at_once(run, capsys):
    edit(run, status="running", planned_iterations=40)
    assert main(["watch", str(run)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("interrupted: the process that recorded it was killed after 12 iter")


@pytest.mark.parametrize(
    ("status", "code"), [("finished", 0), ("diverged", 1), ("failed", 1), ("interrupted", 1)]
)
def test_it_ends_as_the_run_ends(status, code, run, capsys):
    edit(run, status=status, message="[/x] why" if code else None)
    assert main(["watch", str(run)]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{status}: [/x] why after 12" if code else "finished after 12")
    assert last.endswith(f"next: pgt-diag report {run}")


def test_plain_lines_only_when_something_is_new(running, monkeypatch, capsys):
    run = running
    actions = [lambda: None, lambda: None, lambda: edit(run, status="finished")]
    monkeypatch.setattr(time, "sleep", lambda seconds: actions.pop(0)())
    assert main(["watch", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("iteration 12")]) == 2
    assert len([line for line in lines if "layer4.1.conv2" in line]) == 1


def test_a_terminal_gets_one_frame_that_changes(run, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["watch", str(run)]) == 0
    text = capsys.readouterr().out
    assert "iteration 12 of 12" in re.sub(r"\x1b\[[0-9;?]*\w", "", text)
    assert "more layers" in text, "what does not fit is said to be left out"
    assert "\x1b[?1049h" not in text, "what has ended needs no screen of its own"


def test_control_c_is_130(running, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert main(["watch", str(running)]) == 130


def test_a_process_follows_a_run_to_its_end(running):
    run = running
    process = subprocess.Popen(
        [sys.executable, "-m", "pgt_diag", "watch", str(run), "--interval=0.1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "iteration 12" in process.stdout.readline()
    edit(run, status="finished")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.splitlines()[-1].startswith("finished after 12 iterations")


@pytest.mark.parametrize(("arguments", "code"), [(["nowhere"], 3), (["x", "--interval=0"], 2)])
def test_mistakes(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *arguments]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sparklines_show_a_single_death():
    assert sparkline([0, 1, 100]) == " ▁█"
    assert sparkline([0, 0]) == "  " and sparkline([]) == ""
    assert sparkline([4], top=8) == "▄"


def test_one_scale_for_every_layer(run, monkeypatch, capsys):
    snapshot = Follower(run).look(time.time())
    layers = (LayerNow("small", 0, 128, 1, (0, 1)), LayerNow("large", 1, 512, 300, (0, 300)))
    snapshot = dataclasses.replace(snapshot, layers=layers)
    monkeypatch.setattr(Follower, "look", lambda self, now: snapshot)
    assert main(["watch", str(run)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"small +1 / 128 +▁ *$", text, re.M)
    assert re.search(r"large +300 / 512 +▅ *$", text, re.M)


def test_names_with_markup_are_shown_and_not_obeyed(run, tmp_path, capsys):
    name = "[link=x]a[bold]\x1b[31m"
    path = tmp_path / "folder" / name
    shutil.copytree(run, path)
    edit(path, status="failed", message="[link=http:x]why\x1b]8;;", config=None)
    for target in (path, path.parent):
        assert main(["watch", str(target)]) == 1
        told = capsys.readouterr().out
        assert "[link=http:x]why�]8;;" in told and "\x1b" not in told
    assert "[link=x]a[bold]�[31m failed" in told


def test_a_sweep_leaves_word_of_its_runs_for_whoever_watches(tmp_path):
    rows = build_grid(None, {"preset": "smoke", "seed": [0, 1]}).rows
    write_plan(rows, tmp_path / "new" / "sweep")
    assert planned_names(tmp_path / "new" / "sweep") == [row.name for row in rows]
    for text in ("{", "[]", '{"rows": 1}', '{"rows": ["..", "a/b", "/etc", "", 3, "x\\u0000"]}'):
        (tmp_path / PLAN_FILE).write_text(text)
        assert planned_names(tmp_path) == []


def test_durations():
    assert [duration(s) for s in (4.4, 725, 11045)] == ["0:04", "12:05", "3:04:05"]
