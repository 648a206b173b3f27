"""`pgt-diag doctor`: whether this machine is ready to train, record and report."""

import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pgt_diag.text import printable

if TYPE_CHECKING:
    from pgt_diag.doctor import Finding

EPILOG = """\b
Examples:
  pgt-diag doctor                        what is ready, and what to do
  pgt-diag doctor --run-dir /data/runs   the disk where runs will be written
  pgt-diag doctor --json | jq -r '.checks[].remedy // empty'

Ends with 0 when nothing stands in the way, and 1 when there is a problem; a warning is none. With
--json: one object with ok and checks (name, status ok|warning|problem, found, remedy or null).
"""

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
_INDENT = 24
_PACKAGES = ("pgt_diag", "commands", "reports")


def doctor(
    run_dir: Path = typer.Option(
        Path("runs"), "--run-dir", help="Where runs will be written; need not exist yet."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object instead."),
) -> None:
    """Check that this machine is ready, and say what to do where it is not."""
    from pgt_diag.doctor import Status, examine, machine_checks

    checks = {"packages": check_packages, **machine_checks(run_dir)}
    checks |= {"report": check_report, "browser": check_browser}
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    findings: dict[str, Finding] = {}
    for name, check in checks.items():
        if not json_output and sys.stdout.isatty():
            print(f"         {name} …", end="\r", flush=True)
        findings[name] = examine(check)
        if not json_output:
            _print(name, findings[name])
    counts = {
        status: sum(finding.status is status for finding in findings.values()) for status in Status
    }
    ready = not counts[Status.PROBLEM]
    if json_output:
        listed = [{"name": name, **vars(finding)} for name, finding in findings.items()]
        print(json.dumps({"ok": ready, "checks": listed}, indent=2))
    else:
        told = f"{_plural(counts[Status.PROBLEM], 'problem')}, "
        told += _plural(counts[Status.WARNING], "warning")
        print(f"{'ready' if ready else 'not ready'}: {told}")
    if not ready:
        raise typer.Exit(1)


def check_packages() -> "Finding":
    """Check that no other package takes the names of ours, nor the other way round."""
    import importlib.util

    from pgt_diag.doctor import ok, problem, warning

    home = Path(__file__).resolve().parent.parent
    remedy = "run from another folder, or install pgt-diag apart, with pipx install"
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path((spec and spec.origin) or "nowhere").resolve()
        if found.parent != home / name:
            return problem(f"'{name}' is {found}, not the one beside pgt-diag's doctor", remedy)
    others = [
        str(found)
        for folder in dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path)
        for name in _PACKAGES
        for found in (folder / name / "__init__.py", folder / f"{name}.py")
        if folder != home and found.is_file()
    ]
    if others:
        return warning(f"hidden by a package of pgt-diag's: {', '.join(others)}", remedy)
    return ok(f"{', '.join(_PACKAGES)} are pgt-diag's own")


def check_report() -> "Finding":
    """Check that the plotly.js in the page is the one that plotly writes figures for."""
    import re
    from importlib.resources import files

    from plotly.offline import get_plotlyjs_version

    from pgt_diag.doctor import ok, problem

    bundle = files("reports") / "static" / "plotly-basic.min.js"
    with bundle.open(encoding="utf-8") as file:
        head = file.read(1000)
    match = re.search(r"plotly\.js \(basic - minified\) v([\d.]+)", head)
    ours, theirs = match[1] if match else "unknown", get_plotlyjs_version()
    if ours.split(".")[0] == theirs.split(".")[0]:
        return ok(f"pages carry plotly.js {ours}; plotly writes figures for {theirs}")
    return problem(
        f"pages carry plotly.js {ours}, but plotly writes figures for {theirs}",
        "install the plotly that pgt-diag asks for: python -m pip install --upgrade pgt-diag",
    )


def check_browser() -> "Finding":
    """Check that `report --open` has something to open a page with."""
    from commands.browser import find_opener
    from pgt_diag.doctor import ok, warning

    opener = find_opener()
    if opener.command:
        return ok(opener.found)
    remedy = "copy report.html to a machine with a browser; only report --open needs one here"
    return warning(opener.found, remedy)


def _print(name: str, finding: "Finding") -> None:
    """Print one check: a whole line for what reads lines, folded where somebody reads.

    Without rich, which the checks may find to be broken.
    """
    text = printable(finding.found, 2000)
    if finding.remedy:
        text += f"; to do: {printable(finding.remedy, 2000)}"
    word = finding.status.value.ljust(9)
    terminal = sys.stdout.isatty()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if (terminal or os.environ.get("FORCE_COLOR")) and not plain:
        word = typer.style(word, fg=_COLOURS[finding.status])
    if terminal:
        room = max(20, shutil.get_terminal_size().columns - _INDENT)
        # A path that is longer has to be copied whole.
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        text = f"\n{' ' * _INDENT}".join(lines)
    print(f"{word}{name.ljust(_INDENT - 9)}{text}", flush=True)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s'[: count != 1]}"
