"""`pgt-diag report`: turn run directories into one HTML file."""

import sys
from pathlib import Path

import typer

from pgt_diag.errors import ConfigurationError, RunDirectoryError

EPILOG = """\b
Examples:
  pgt-diag report runs/baseline runs/pgt          writes report.html
  pgt-diag report runs -o table2.html --open      every run in a folder
  pgt-diag report runs/pgt --layers 0,5,layer4.1.conv2
"""


def report(
    runs: list[Path] = typer.Argument(help="Run directories, or folders of them."),
    output: Path = typer.Option("report.html", "--output", "-o", help="File to write."),
    layers: str | None = typer.Option(
        None, help="Layers of Fig. 3, by the paper's index or by name; by default 11 and 19."
    ),
    open_page: bool = typer.Option(False, "--open", help="Open the report in the browser."),
) -> None:
    """Turn runs into one HTML file: verdict, filter norms, feature maps, Table 2."""
    # Late, so that a mistyped option is answered before pandas and plotly are loaded.
    from pgt_diag.run import find_runs, load_run
    from reports.page import build_page
    from reports.panels import DEFAULT_LAYERS

    paths = [found for path in runs for found in _found(path, list(find_runs(path)))]
    unique = list(dict.fromkeys(path.resolve() for path in paths))
    if output.is_dir():
        raise ConfigurationError(f"--output {output}: is a folder; name a file")
    page = build_page(
        [load_run(path) for path in unique],
        layers=DEFAULT_LAYERS if layers is None else _layers(layers),
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {output}: {error.strerror}") from None
    size = output.stat().st_size / 1e6
    print(f"{output} ({size:.1f} MB, {len(unique)} run{'s'[: len(unique) != 1]})")
    if open_page and typer.launch(output.resolve().as_uri()):
        print(f"no browser to open {output} with", file=sys.stderr)


def _found(path: Path, runs: list[Path]) -> list[Path]:
    if not runs:
        reason = "no run here, nor in its folders" if path.exists() else "no such directory"
        raise RunDirectoryError(f"{path}: {reason}")
    return runs


def _layers(text: str) -> list[int | str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    return [int(name) if name.isdecimal() else name for name in names]
