"""Which runs `check`, `report`, `show` and `watch` find where they are told to look: every one."""

import json
import shutil
from pathlib import Path

import pytest

from pgt_diag.config import compose
from pgt_diag.sweep.grid import Row
from pgt_diag.sweep.making import starting_point
from pgt_diag.sweep.status import State, status_of
from tests.damage import OPTIONS, copy_of, finished_run, interrupted_run, outcome

COMMANDS = ("check", "report", "show")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good run and what may stand beside runs: it is where commands run."""
    monkeypatch.chdir(tmp_path)
    copy_of(whole, tmp_path / "runs" / "good")
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "report.html").write_text("")
    return tmp_path / "runs"


def without_run_file(folder: Path, whole: Path) -> Path:
    run = copy_of(whole, folder / "bad")
    (run / "run.json").unlink()
    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("named", ["runs", "runs/bad", "runs/good runs/bad"])
def test_a_run_whose_run_json_is_gone_is_named_as_damaged(
    command: str, named: str, folder: Path, whole: Path
) -> None:
    without_run_file(folder, whole)
    code, output, error = outcome(command, *named.split())
    assert code == (1 if command == "check" else 3)
    told = "runs/bad: damaged run: run.json is missing"
    start = "damaged: " if command == "check" else "pgt-diag: error: "
    assert [line for line in (output + error).splitlines() if line.startswith(start + told)]
    assert "intact: runs/bad" not in output


@pytest.mark.parametrize(
    "left",
    ["trace", "iterations", "checkpoints", "feature_maps", "metrics.csv", "events.parquet"],
)
def test_any_one_of_a_runs_own_files_and_folders_is_enough(
    left: str, folder: Path, whole: Path
) -> None:
    run = without_run_file(folder, whole)
    for entry in run.iterdir():
        if entry.name != left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    code, output, _ = outcome("check", "runs", "--json")
    found = {Path(each["path"]).name: each for each in json.loads(output)["runs"]}
    assert code == 1
    assert found["good"]["problems"] == []
    assert left in found["bad"]["problems"][0]


def test_watching_a_run_whose_run_json_is_gone_says_so(folder: Path, whole: Path) -> None:
    without_run_file(folder, whole)
    code, _, error = outcome("watch", "runs/bad")
    assert code == 3
    assert "runs/bad: damaged run" in error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("runs/notes", "runs/notes: no run here, nor in its folders"),
        ("runs/report.html", "runs/report.html: is a file, and a run is a directory"),
        ("nowhere", "nowhere: no such directory"),
        ("runs/good/trace", "runs/good/trace: no run here, nor in its folders"),
    ],
)
def test_a_named_path_without_a_run_is_an_error_beside_a_good_run(
    command: str, other: str, message: str, folder: Path
) -> None:
    code, output, error = outcome(command, "runs/good", other)
    assert code == 3
    assert error.splitlines() == [f"pgt-diag: error: {message}"]
    assert "intact" not in output


@pytest.mark.parametrize("command", [*COMMANDS, "watch"])
@pytest.mark.parametrize("content", ["", "{}"])
def test_an_empty_run_json_is_damage(command: str, content: str, folder: Path, whole: Path) -> None:
    run = copy_of(whole, folder / "bad")
    (run / "run.json").unlink()
    (run / "run.json").write_text(content)
    code, output, error = outcome(command, "runs/bad" if command == "watch" else "runs")
    assert code == (1 if command == "check" else 3)
    assert "runs/bad/run.json: damaged" in output + error


@pytest.mark.parametrize("command", COMMANDS)
def test_links_to_runs_are_followed_once_and_links_to_nothing_are_named(
    command: str, folder: Path
) -> None:
    (folder / "latest").symlink_to("good")
    code, output, error = outcome(command, "runs", "runs/latest", "runs/good")
    assert code == 0, error
    assert output.count("intact: ") == (command == "check")
    (folder / "old").symlink_to("gone")
    for named in ("runs", "runs/old"):
        code, _, error = outcome(command, named)
        assert code == 3
        assert "runs/old: is a link to 'gone', which is not there" in error


def test_a_directory_in_which_a_run_is_about_to_begin_is_no_damaged_run(folder: Path) -> None:
    (folder / "next").mkdir()
    (folder / "next" / ".lock").touch()
    assert outcome("check", "runs")[0] == 0


def test_resume_auto_goes_on_where_run_json_is_gone(folder: Path) -> None:
    (interrupted_run(folder / "bad") / "run.json").unlink()
    code, output, error = outcome(
        "train", "--run-dir=runs/bad", "--resume=auto", "--dry-run", "--json"
    )
    assert code == 0, error
    assert json.loads(output)["plan"]["done"] == 6


def test_a_sweep_does_not_take_a_run_without_its_run_json_for_a_new_one(
    folder: Path, whole: Path
) -> None:
    row = Row(*compose(None, {}, OPTIONS))
    run = copy_of(whole, folder / row.name)
    (run / "run.json").unlink()
    assert status_of(row, folder).state is State.INTERRUPTED
    shutil.rmtree(run / "checkpoints")
    status = status_of(row, folder)
    assert status.state is State.FAILED
    assert "damaged run" in str(status.message)
    assert starting_point(run, retry_failed=True) is None
    assert (folder / "failed" / f"{row.name}-1" / "trace").is_dir()
