"""The library names arguments as a call has them, and the command line names its options."""

import ast
import re
from pathlib import Path

import pytest
import torch

import pgt_diag
from commands.app import main
from pgt_diag.config import as_typed
from pgt_diag.errors import RunDirectoryError
from tests.loops import small_net

LIBRARY = Path(pgt_diag.__file__).parent
OTHERS = re.compile(r"(pip install|apt install|ray start)[^;]* --|#SBATCH|`pgt-diag ")
"""Other programs' options, and whole commands."""


def test_no_message_of_the_library_names_an_option() -> None:
    files = [file for file in LIBRARY.rglob("*.py") if file.name != "doctor.py"]
    # The doctor's findings are about the command line.
    found = [
        f"{file.relative_to(LIBRARY)}: {text}"
        for file in files
        for text in _texts(ast.parse(file.read_text()))
        if re.search(r"\S\s+--[a-z]", text) and not OTHERS.search(text)
    ]
    assert found == []


def _texts(tree: ast.AST) -> list[str]:
    """Return the texts of a module, f-strings whole, without those that stand alone."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts, parts = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = [each for each in node.values if isinstance(each, ast.Constant)]
            parts |= {id(each) for each in pieces}
            texts.append(" … ".join(str(each.value) for each in pieces))
        elif isinstance(node, ast.Constant) and id(node) not in alone | parts:
            texts.append(str(node.value))
    return texts


def test_a_taken_directory_is_told_in_the_words_of_the_caller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer).close()
    with pytest.raises(RunDirectoryError) as caught:
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    assert "go on with `resume=...`, or replace it with `force=True`" in str(caught.value)
    arguments = ["train", "--dataset=synthetic", "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--dry-run"]) == 3
    line = capsys.readouterr().err
    assert "go on with --resume, or replace it with --force" in line
    assert "`" not in line


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("drop `download=True`", "drop --download"),
        ("use `decay_biases=False`", "use --no-decay-biases"),
        ('use `bad_images="skip"`', "use --bad-images skip"),
        ("name it: `directory=DIR`", "name it: --run-dir DIR"),
        ("runs/lr=0.1: `pgt-diag check` it", "runs/lr=0.1: `pgt-diag check` it"),
        ("a `b=c", "a `b=c"),
    ],
)
def test_an_argument_becomes_the_option_of_its_name(message: str, typed: str) -> None:
    assert as_typed(message) == typed
