"""`pgt-diag report` as it is typed: formats, what it overwrites, --watch, --demo, --open."""

import errno
import json
import shutil
import time
from pathlib import Path

import pytest

from commands.app import main
from pgt_diag.directory import claimed
from pgt_diag.errors import NoSpaceError
from pgt_diag.resuming import ResumePoint
from pgt_diag.run import load_run
from reports.demo import demo_runs
from reports.output import write_output
from tests import runs

TINY = [
    "--dataset=synthetic", "--synthetic-images=32", "--image-size=16", "--batch-size=16",
    "--device=cpu", "--threads=1", "--epochs=2", "--warmup-epochs=0",
]  # fmt: skip
FORMATS = {"latex": "table2.tex", "csv": "table2.csv", "json": "table2.json"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "baseline"
    assert main(["train", *TINY, f"--run-dir={path}"]) == 0
    return path


@pytest.fixture
def folder(recorded, tmp_path, monkeypatch):
    """A folder with a baseline and what claims to be a PGT run, as working directory."""
    shutil.copytree(recorded, tmp_path / "runs" / "baseline")
    shutil.copytree(recorded, tmp_path / "runs" / "pgt")
    edit(tmp_path / "runs" / "pgt", config={"method": "pgt"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(run, config=None, **values):
    info = json.loads((run / "run.json").read_text())
    runs.edit(run, config=info["config"] | (config or {}), **values)


def only_line(text):
    (line,) = text.splitlines()
    return line


@pytest.mark.parametrize("name", FORMATS)
def test_table_2_alone(name, folder, capsys):
    assert main(["report", "runs", f"--format={name}"]) == 0
    assert only_line(capsys.readouterr().out).startswith(f"{FORMATS[name]} (")
    text = (folder / FORMATS[name]).read_text()
    assert main(["report", "runs", f"--format={name}", "-o", "-"]) == 0
    assert capsys.readouterr().out == text
    # What the file ends in says the format as well, and our own table may be replaced.
    assert main(["report", "runs", "-o", FORMATS[name]]) == 0
    assert (folder / FORMATS[name]).read_text() == text
    if name == "json":
        assert [row["method"] for row in json.loads(text) if row["runs"]] == ["baseline", "pgt"]
    else:
        assert "PGT & 0.25" in text if name == "latex" else ",pgt,0.25,,1," in text


@pytest.mark.parametrize("name", ["r", "r.html", "r.HTM", "r.xhtml"])
def test_what_is_written_is_what_the_name_says(name, folder):
    options = ["--format=html"] if name == "r.xhtml" else []
    assert main(["report", "runs/pgt", "-o", name, *options]) == 0
    assert (folder / name).read_text().startswith("<!doctype html>")


def test_a_page_goes_to_standard_output(folder, capsysbinary):
    assert main(["report", "runs/pgt", "-o", "page.html"]) == 0
    capsysbinary.readouterr()
    assert main(["report", "runs/pgt", "-o", "-"]) == 0
    told = capsysbinary.readouterr()
    assert told.out == (folder / "page.html").read_bytes() and told.err == b""


def test_another_table_is_asked_for_by_its_number(folder, capsys):
    edit(folder / "runs" / "pgt", config={"method": "pgt", "norm": "batch"})
    assert main(["report", "runs", "--table=1", "--format=csv"]) == 0
    assert only_line(capsys.readouterr().out).startswith("table1.csv (")
    assert "resnet18,cosine,0.0,pgt,0.25,,1," in (folder / "table1.csv").read_text()
    assert main(["report", "runs/pgt", "--format=csv"]) == 0
    assert only_line(capsys.readouterr().out).startswith("table1.csv ("), "ours may be replaced"
    assert main(["report", "runs", "--table=1"]) == 2
    assert "--table: a page has all tables" in capsys.readouterr().err


def test_the_last_epoch_is_told_where_it_is_asked_for(folder, capsys):
    table = {}
    for options in ([], ["--last-epoch"]):
        assert main(["report", "runs", "--format=json", "-o", "-", *options]) == 0
        table[len(options)] = json.loads(capsys.readouterr().out)[0]["test_accuracy"]
    metrics = load_run(folder / "runs" / "baseline").metrics["test_accuracy"]
    assert table == {0: pytest.approx(metrics.max()), 1: pytest.approx(metrics.iloc[-1])}


def test_files_that_are_not_ours_stay(folder, capsys):
    path = folder / "notes.html"
    path.write_text("<html>my notes, made with pgt-diag")
    assert main(["report", "runs", "-o", "notes.html"]) == 2
    assert "--force" in only_line(capsys.readouterr().err)
    assert path.read_text().endswith("my notes, made with pgt-diag")
    assert main(["report", "runs", "-o", "notes.html", "--force"]) == 0
    assert "</html>" in path.read_text()
    # Now it is a report of ours, as an empty file might as well have been.
    assert main(["report", "runs", "-o", "notes.html", "--title=Again & again"]) == 0
    assert "<title>Again &amp; again</title>" in path.read_text()
    (folder / "empty.html").touch()
    assert main(["report", "runs", "-o", "empty.html"]) == 0
    assert {each.name for each in folder.iterdir()} == {"runs", "notes.html", "empty.html"}


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_output(path, "old")

    def full(target, content):
        target.write_bytes(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("reports.output._write_bytes", full)
    with pytest.raises(NoSpaceError, match="no space left; what was there is untouched"):
        write_output(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_stay_links_and_devices_devices(folder):
    (folder / "real").mkdir()
    (folder / "link.html").symlink_to("real/report.html")
    write_output(folder / "link.html", "page")
    assert (folder / "link.html").is_symlink()
    assert (folder / "real" / "report.html").read_text() == "page"
    write_output(Path("/dev/null"), "page")
    assert Path("/dev/null").is_char_device()


MISTAKES = {
    "nothing to report": (["report"], "RUNS is missing"),
    "demo of runs": (["report", "runs", "--demo"], "leave RUNS away"),
    "demo that goes on": (["report", "--demo", "--watch"], "leave --watch away"),
    "demo as a table": (["report", "--demo", "--format=csv"], "leave --format csv away"),
    "opening standard output": (["report", "runs", "-o", "-", "--open"], "--open needs a file"),
    "watching to standard output": (
        ["report", "runs", "--format=csv", "-o", "-", "--watch"],
        "--watch needs a file",
    ),
    "an ending that is no format's": (
        ["report", "runs", "-o", "r.pdf"],
        ".html, .tex, .csv, .json",
    ),
    "a format and another's ending": (
        ["report", "runs", "--format=csv", "-o", "r.json"],
        "leave one",
    ),
    "a page with a table's ending": (
        ["report", "runs", "--format=html", "-o", "r.csv"],
        "leave one",
    ),
    "opening a table": (["report", "runs", "--format=csv", "--open"], "leave one away"),
    "unknown format": (["report", "runs", "--format=pdf"], "latex"),
    "no layer": (["report", "runs", "--layers=,"], "--layers is ','"),
    "hostile layer": (["report", "runs", "--layers=\x1b[31m[/x]<b>"], "no layer|no run has"),
    "file in the way": (["report", "runs", "-o", "runs/pgt/run.json/x.html"], "run.json/x.html"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(mistake, folder, capsys):
    arguments, message = MISTAKES[mistake]
    assert main(arguments) == 2
    line = only_line(capsys.readouterr().err)
    assert any(part in line for part in message.split("|")), line
    assert "\x1b" not in line
    assert {each.name for each in folder.iterdir()} == {"runs"}


def test_demo_needs_no_runs_and_says_what_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = demo_runs(iteration_count=400, record_every=20)
    monkeypatch.setattr("reports.demo.demo_runs", lambda: small)
    assert main(["report", "--demo"]) == 0
    assert only_line(capsys.readouterr().out).endswith("made-up runs)")
    page = (tmp_path / "report.html").read_text()
    assert "This report is made up" in page and 'id="table2"' in page and 'id="fig4"' in page
    assert main(["report", "--demo", "--title=Mine"]) == 0


def program(folder, name, text):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_open_shows_the_page_in_the_browser(folder, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.delenv("BROWSER", raising=False)
    program(folder, "xdg-open", f'echo "$1" > {folder}/opened')
    assert main(["report", "runs/pgt", "-o", "a page.html", "--open"]) == 0
    assert (folder / "opened").read_text().strip() == (folder / "a page.html").as_uri()
    assert capfd.readouterr().err == ""


def test_what_cannot_be_opened_is_told_in_one_line(folder, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.delenv("BROWSER", raising=False)
    program(folder, "xdg-open", "for n in 1 2 3 4 5 6 7; do echo not found >&2; done; exit 3")
    assert main(["report", "runs/pgt", "--open"]) == 0
    told = only_line(capfd.readouterr().err)
    assert "exit code 3" in told and told.endswith("copy report.html to where there is a browser")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert main(["report", "runs/pgt", "--open"]) == 0
    assert "no display" in only_line(capfd.readouterr().err)


def sleeps(monkeypatch, *actions):
    """Let each sleep of the command do the next thing instead."""
    left = list(actions)
    monkeypatch.setattr(time, "sleep", lambda seconds: left.pop(0)())
    return left


def interrupt():
    raise KeyboardInterrupt


def test_watch_rebuilds_until_the_runs_have_ended(folder, monkeypatch, capsys):
    run = folder / "runs" / "pgt"
    info = (run / "run.json").read_text()
    edit(run, status="running")
    left = sleeps(
        monkeypatch,
        lambda: None,
        lambda: (run / "run.json").write_text("{"),
        lambda: (run / "run.json").write_text(info),
    )
    with runs.being_written(run):
        assert main(["report", "runs", "--watch"]) == 0
    assert left == []
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert len(lines) == 2, "nothing new is no reason to rebuild"
    assert "2 runs, 4 iterations, 1 still running" in lines[0]
    assert "2 runs, 4 iterations, all ended" in lines[1]
    assert only_line(told.err).startswith("not rebuilt: ")
    assert "still training" not in (folder / "report.html").read_text()


def test_watch_ends_with_control_c_and_says_when_a_run_is_silent(folder, monkeypatch, capsys):
    run = folder / "runs" / "pgt"
    edit(run, status="running")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    sleeps(monkeypatch, lambda: None, interrupt)
    with runs.being_written(run):
        assert main(["report", str(run), "--watch", "--format=csv"]) == 130
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("table2.csv (")
    assert "no new data since 1,00" in second and second.endswith("still waiting, Ctrl-C ends")


def test_a_killed_run_that_is_being_resumed_goes_on_for_its_readers(folder, monkeypatch, capsys):
    run = folder / "runs" / "baseline"
    edit(run, status="running")
    assert load_run(run).status == "interrupted", "nobody writes it"
    point = ResumePoint(load_run(run).config, None, None, finished=False, damaged=())
    monkeypatch.setattr("pgt_diag.resuming.resume_point", lambda directory: point)
    statuses = []

    def train(config, directory, **_):
        statuses.append(load_run(directory).status)
        return directory

    monkeypatch.setattr("pgt_diag.training.train", train)
    assert main(["train", f"--run-dir={run}", "--resume"]) == 0
    assert statuses == ["running"], "also before anything is loaded"
    assert load_run(run).status == "interrupted"


def test_watch_waits_for_a_run_that_is_being_resumed(folder, monkeypatch, capsys):
    run = folder / "runs" / "baseline"
    edit(run, status="running")
    left = sleeps(monkeypatch, lambda: None, lambda: edit(run, status="finished"))
    with claimed(run):
        assert main(["report", str(run), "--watch", "--format=csv"]) == 0
    assert left == []
    assert "still running" in capsys.readouterr().out
    assert main(["report", str(run), "--watch", "--format=csv"]) == 0
