"""`pgt-diag show`: what the terminal and scripts are told about runs."""

import io
import json
import re
import shutil
import unicodedata

import pytest
from rich.console import Console
from rich.table import Table

from commands.app import main
from commands.terminal import safe
from pgt_diag.run import load_run
from pgt_diag.text import printable
from reports import digest as digest_module
from reports.digest import digest
from reports.summary import summarise
from reports.verdict import verdict
from tests.hostile import HOSTILE as HOSTILE_STRINGS
from tests.runs import being_written, edit

TINY = [
    "--dataset=synthetic", "--synthetic-images=32", "--image-size=16", "--batch-size=16",
    "--device=cpu", "--threads=1", "--epochs=6", "--warmup-epochs=0",
]  # fmt: skip
HOSTILE = "[link=http:x]a[bold]\x1b[31m{{7}}<b>"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "baseline"
    assert main(["train", *TINY, f"--run-dir={path}"]) == 0
    return path


@pytest.fixture
def hostile(recorded, tmp_path):
    """A diverged run of somebody's own loop whose every string is hostile."""
    path = tmp_path / HOSTILE
    shutil.copytree(recorded, path)
    edit(path, config=None, model=HOSTILE, message="[/x]" + HOSTILE, status="diverged")
    return path


def test_the_verdict_and_the_tables(recorded, capsys):
    assert main(["show", str(recorded)]) == 0
    text = capsys.readouterr().out
    summary = summarise([load_run(recorded)])[0]
    assert verdict([summary.run]).sentences[0].text in text
    for layer, row in summary.by_layer.iterrows():
        assert re.search(rf"{row['index']} +{layer} +{row['filters']} +{row['dead']}\b", text)
    assert re.search(r"16 +Baseline +– +1 +[\d.]+ +– +[\d.]+", text)
    assert "\x1b" not in text, "no colours where nobody looks"


def test_colours_only_where_they_are_wanted(recorded, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(["show", str(recorded)]) == 0
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["show", str(recorded)]) == 0
    assert not re.search(r"\x1b\[[0-9;]*3\dm", capsys.readouterr().out)


def test_json_has_the_documented_keys_and_plain_numbers(recorded, capsys):
    assert main(["show", str(recorded), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert set(answer) == {"schema_version", "runs", "verdict", "table1", "table2", "table3"}
    (run,) = answer["runs"]
    for key in (*run, *run["layers"][0], *answer["verdict"], *answer["verdict"]["claims"][0]):
        assert re.search(rf"\b{key}\b", digest_module.__doc__), key
    summary = summarise([load_run(recorded)])[0]
    assert run["dead"] == summary.dead == run["silent_from_start"] + run["died_later"]
    assert run["dead"] == sum(layer["dead"] for layer in run["layers"])
    assert (run["status"], run["iterations"], run["filters"]) == ("finished", 12, 4800)
    assert run["planned_iterations"] == 12
    assert answer["table2"][0]["test_accuracy"] == run["test_accuracy"]


def test_hostile_names_are_shown_and_not_obeyed(hostile, recorded, monkeypatch, capsys):
    shown = "[link=http:x]a[bold]�[31m{{7}}<b>"
    assert main(["show", str(hostile), str(recorded)]) == 0
    text = capsys.readouterr().out
    assert f"{shown} diverged" in text and f"([/x]{shown})" in text
    assert "\x1b" not in text
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["show", str(hostile)]) == 0
    assert "\x1b]8" not in capsys.readouterr().out, "no hyperlink"
    assert main(["show", str(hostile), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["message"] == "[/x]" + HOSTILE


def test_runs_that_have_recorded_nothing_yet(recorded, tmp_path, capsys):
    path = tmp_path / "new"
    path.mkdir()
    shutil.copy(recorded / "run.json", path)
    edit(path, status="running", digests={})
    with being_written(path):
        assert main(["show", str(path)]) == 0
        text = capsys.readouterr().out
        assert "still training" in text and "no iteration is recorded yet" in text
        assert digest([load_run(path)])["runs"][0]["iterations"] == 0


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["nowhere"], 3), (["."], 3)])
def test_mistakes(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", *arguments]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["show", "watch", "report"])
def test_help_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"pgt-diag {command}" in capsys.readouterr().out.partition("Examples:")[2]


def test_no_hostile_string_acts_on_a_terminal():
    for text in HOSTILE_STRINGS:
        stream = io.StringIO()
        screen = Console(file=stream, force_terminal=True, width=7000, highlight=False, emoji=False)
        table = Table("label")
        table.add_row(safe(text, 6000))
        screen.print(f"[bold]{safe(text, 6000)}[/]")
        screen.print(table)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
        assert plain.splitlines()[0] == printable(text, 6000)
        assert printable(text, 6000) in "".join(plain.splitlines()[1:])
        assert not any(unicodedata.category(sign) == "Cc" for sign in plain if sign != "\n")
        assert "]8;" not in stream.getvalue(), "a link was made of it"
