"""`pgt-diag check`: say whether every file of a run is what was written."""

import json
from pathlib import Path

import typer

EPILOG = """\b
Examples:
  pgt-diag check runs/pgt            every file against its checksum
  pgt-diag check runs --json         each run below runs, for a script
"""


def check(
    runs: list[Path] = typer.Argument(help="Run directories, or directories of runs."),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Read every file of runs against its checksum; say what is damaged and where to go on."""
    from pgt_diag.run import find_runs

    found = find_runs(runs)
    # Late, so that a path without a run is answered before torch is loaded.
    from commands.terminal import say
    from pgt_diag.check import check_run

    checks = [check_run(path) for path in found]
    bad = sum(1 for each in checks if each.problems)
    if json_output:
        plain = [
            {**vars(each), "path": str(each.path), "checkpoint": _text(each.checkpoint)}
            for each in checks
        ]
        print(json.dumps({"ok": not bad, "runs": plain}))
    else:
        for each in checks:
            for problem in each.problems:
                say(f"damaged: {problem}")
            for note in each.notes:
                say(f"note: {note}")
            iterations = "" if each.iterations is None else f", {each.iterations:,} iterations"
            going_on = (
                f"; --resume goes on from {each.checkpoint.name[:23]}" if each.checkpoint else ""
            )
            say(
                f"{'damaged' if each.problems else 'intact'}: {each.path} ({each.files} files"
                f"{iterations}, {each.status or 'unknown status'}){going_on}"
            )
    if bad:
        raise typer.Exit(1)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
