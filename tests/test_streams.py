"""Commands whose standard streams are closed, full, of another encoding, or of no width."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from commands.streams import make_safe
from tests.damage import copy_of, finished_run

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "help": [],
    "train help": ["train", "--help"],
    "sweep help": ["sweep", "--help"],
    "version": ["--version"],
    "show": ["show", "run"],
    "show json": ["show", "run", "--json"],
    "watch": ["watch", "run", "--once"],
    "check": ["check", "run"],
    "table": ["report", "run", "--format=csv", "-o", "-"],
    "mistake": ["train", "--alpha=α"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    finished_run(folder / "run")
    return folder


def shell(
    folder: Path, words: list[str], redirections: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    line = shlex.join([sys.executable, "-m", "pgt_diag", *words])
    return subprocess.run(
        ["bash", "-c", f"{line} {redirections}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )


def is_told(done: subprocess.CompletedProcess[bytes], name: str) -> bool:
    """Whether the command ended as it does everywhere, and said so without a traceback."""
    lines = done.stderr.splitlines()
    return done.returncode == (2 if name == "mistake" else 0) and len(lines) <= (name == "mistake")


@pytest.mark.parametrize("name", COMMANDS)
def test_what_an_encoding_lacks_is_a_question_mark(name: str, folder: Path) -> None:
    done = shell(folder, COMMANDS[name], PYTHONIOENCODING="latin-1")
    assert is_told(done, name), done.stderr
    assert done.stderr if name == "mistake" else done.stdout


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict", "cp1252"])
def test_help_is_shown_in_any_encoding(encoding: str, folder: Path) -> None:
    done = shell(folder, ["train", "--help"], PYTHONIOENCODING=encoding)
    assert is_told(done, "train help"), done.stderr
    assert b"PGT's exponent" in done.stdout


@pytest.mark.parametrize("width", ["abc", "1e3", "0", "-5"])
def test_a_width_that_is_none_is_forgotten(width: str, folder: Path) -> None:
    usual = shell(folder, ["show", "run"], COLUMNS="")
    done = shell(folder, ["show", "run"], COLUMNS=width)
    assert is_told(done, "show"), done.stderr
    assert done.stdout == usual.stdout
    assert len(done.stdout) > 1000


@pytest.mark.parametrize("text", ["abc", "1e3", "0", "-5", "", " 80", "²", "1" * 5000, "10001"])
def test_only_a_number_of_columns_is_left_to_who_asks(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, text)
    make_safe()
    assert not {"COLUMNS", "LINES", "TERMINAL_WIDTH"} & os.environ.keys()
    monkeypatch.setenv("COLUMNS", "100")
    make_safe()
    assert os.environ["COLUMNS"] == "100"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_output_is_no_error(name: str, folder: Path) -> None:
    assert is_told(done := shell(folder, COMMANDS[name], ">&-"), name), done.stderr


def test_nothing_of_a_closed_error_stream_comes_into_the_output(folder: Path) -> None:
    done = shell(folder, COMMANDS["mistake"], "2>&-")
    assert (done.returncode, done.stdout) == (2, b"")
    done = shell(folder, COMMANDS["show"], "<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_file_does_not_take_the_place_of_a_closed_stream(folder: Path) -> None:
    done = shell(folder, ["report", "run", "-o", "page.html"], ">&- 2>&-")
    assert done.returncode == 0
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert text.lower().startswith("<!doctype html>")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["help", "train help", "version", "show", "show json"])
def test_a_full_output_is_told_in_one_line(name: str, folder: Path) -> None:
    done = shell(folder, COMMANDS[name], "> /dev/full")
    assert done.returncode == 4
    assert done.stderr == b"pgt-diag: error: standard output: No space left on device\n"


def test_the_next_command_works_when_it_is_copied(folder: Path, tmp_path: Path) -> None:
    name = "a\nb 'c' \x1b[31m\u202e"
    copy_of(folder / "run", tmp_path / name)
    done = shell(tmp_path, ["watch", name, "--once"])
    assert done.returncode == 0, done.stderr
    command = done.stdout.decode().rstrip("\n").rpartition("next: pgt-diag ")[2]
    assert command.isprintable()
    again = f"{shlex.quote(sys.executable)} -m pgt_diag {command} -o page.html"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", again], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "page.html").is_file()
