"""How a mistyped command is answered: one wording for each mistake, and help without riddles."""

import re

import pytest

from commands.app import main

MISTAKES = {
    "check": "RUNS is missing: name run directories",
    "show": "RUNS is missing: name run directories",
    "report": "RUNS is missing: name run directories, or use --demo",
    "train --junit": "no such option: --junit; see pgt-diag train --help",
    "check --junit run": "no such option: --junit; see pgt-diag check --help",
    "train --fail-if-dead": "no such option: --fail-if-dead; see pgt-diag train --help",
    "--colour": "no such option: --colour; see pgt-diag --help",
    "check -x run": "no such option: -x; see pgt-diag check --help",
    "train --epohcs=1": "no such option: --epohcs; did you mean --epochs?",
    "trian": "no such command: trian; did you mean train?",
    "colours": "no such command: colours; see pgt-diag --help",
    "doctor now": "unexpected: now; see pgt-diag doctor --help",
    "train --lr": "--lr needs a value",
    "train --dry-run=yes": "--dry-run takes no value",
    "train --method=sgd": (
        "--method is 'sgd'; choose one of baseline, pgt, gc, agc, gc+pgt, agc+pgt"
    ),
    "train --epochs=many": "--epochs is 'many'; it must be a whole number",
    "train --nproc=0": "--nproc is 0; it must be a number of at least 1",
    "train --peer-timeout=soon": "--peer-timeout is 'soon'; it must be a number",
    "report --table=4 run": "--table is 4; it must be a number of at most 3",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistyped_command_is_answered_in_our_words(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == 2
    assert capsys.readouterr().err == f"pgt-diag: error: {MISTAKES[typed]}\n"


@pytest.mark.parametrize("written", ["method = 'sgd'", "epochs = 'many'"])
def test_an_option_and_a_file_are_answered_alike(
    written: str, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(written)
    key, value = written.replace("'", "").split(" = ")
    assert main(["train", f"--config={file}"]) == 2
    in_file = capsys.readouterr().err
    assert main(["train", f"--{key}={value}"]) == 2
    assert in_file.replace(f"{file}: {key}", f"--{key}") == capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "sweep", "report", "show", "watch", "check", "doctor", "bench", ""]
)
def test_help_shows_no_flag_as_a_value_and_no_default_that_is_none(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"<bool>|\bNone\b", text)
    assert command != "train" or "smoke 8, fashion 32" in text
