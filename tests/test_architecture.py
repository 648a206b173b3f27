"""Which part may import which, and what must not be loaded to say hello."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "pgt_diag": {"pgt_diag"},
    "reports": {"pgt_diag", "reports"},
    "commands": {"pgt_diag", "reports", "commands"},
}


def imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_from_commands_to_reports_to_the_library(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        if file == ROOT / "pgt_diag" / "__main__.py":
            continue
        ours = imported_packages(file) & set(ALLOWED)
        assert ours <= ALLOWED[package], f"{file.relative_to(ROOT)} imports {ours}"


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in result.stdout.split()}


def test_help_loads_neither_torch_nor_pandas_nor_plotly() -> None:
    code = "from commands.app import main; assert main(['--help']) == 0"
    assert not {"torch", "timm", "pandas", "plotly", "pyarrow", "numpy"} & loaded_after(code)


def test_a_mistyped_option_is_answered_without_loading_torch() -> None:
    code = "from commands.app import main; assert main(['train', '--lr', '-7']) == 2"
    assert "torch" not in loaded_after(code)


def test_the_library_loads_no_command_line_and_no_plots() -> None:
    code = "import pgt_diag, pgt_diag.training, pgt_diag.run, pgt_diag.recorder"
    assert not {"typer", "rich", "plotly", "pandas", "sklearn", "commands", "reports"} & (
        loaded_after(code)
    )
