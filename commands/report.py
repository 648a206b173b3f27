"""`pgt-diag report`: turn run directories into one HTML file, or into one table alone."""

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pgt_diag.errors import ConfigurationError, PgtDiagError

if TYPE_CHECKING:
    from pgt_diag.run import Run

EPILOG = """\b
Examples:
  pgt-diag report runs/baseline runs/pgt          writes report.html
  pgt-diag report runs -o all.html --open         every run in a folder
  pgt-diag report runs/pgt --layers 0,5,layer4.1.conv2
  pgt-diag report runs/pgt --watch                rebuilt while the run goes on
  pgt-diag report runs --format latex -o -        Table 2 to standard output
  pgt-diag report runs -o - | ssh host 'cat > report.html'
  pgt-diag report runs --table 1 --format csv     networks with batch normalisation
  pgt-diag report --demo --open                   a made-up report, without any run

An existing report of pgt-diag's is replaced; any other file only with --force.
"""


class Format(StrEnum):
    """What is written: the page, or one of the paper's tables as text."""

    HTML = "html"
    LATEX = "latex"
    CSV = "csv"
    JSON = "json"


_ENDINGS = {Format.HTML: ".html", Format.LATEX: ".tex", Format.CSV: ".csv", Format.JSON: ".json"}
_FORMATS = {ending: chosen for chosen, ending in _ENDINGS.items()} | {".htm": Format.HTML}
_STDOUT = Path("-")


def report(
    runs: list[Path] = typer.Argument(
        None, help="Run directories, or folders of them.", show_default=False
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        help="File to write; '-' is standard output. By default report.html, or table2 (or another "
        "--table) with the format's ending.",
        show_default=False,
    ),
    file_format: Format | None = typer.Option(
        None,
        "--format",
        help="The page, or one table alone; by default what --output ends in, else html.",
        show_default=False,
    ),
    number: int | None = typer.Option(
        None,
        "--table",
        min=1,
        max=3,
        help="Which of the paper's tables --format writes; by default 2, or 1 where all runs have "
        "batch normalisation.",
        show_default=False,
    ),
    last: bool = typer.Option(
        False,
        "--last-epoch",
        help="Accuracies of the last epoch, not of the best on test images.",
    ),
    layers: str | None = typer.Option(
        None, help="Layers of Fig. 3, by the paper's index or by name; by default 11 and 19."
    ),
    title: str | None = typer.Option(None, help="Title of the page; by default the runs' names."),
    watch: bool = typer.Option(
        False, "--watch", help="Rebuild while runs go on, until all have ended."
    ),
    interval: float = typer.Option(10.0, min=0.1, help="--watch: seconds between two looks."),
    demo: bool = typer.Option(False, "--demo", help="A page of made-up runs; give no RUNS."),
    open_page: bool = typer.Option(False, "--open", help="Open the page in the browser."),
    force: bool = typer.Option(
        False, "--force", help="Replace a file that is no report of pgt-diag's."
    ),
) -> None:
    """Turn runs into one HTML file: verdict, filter norms, feature maps, the paper's tables."""
    chosen = _format(file_format, output)
    _check_together(runs or [], chosen, output, number, demo=demo, watch=watch, open_page=open_page)
    wanted = _layers(layers)
    # Late, so that a mistyped option is answered before pandas and plotly are loaded.
    from reports.output import check_output

    unnamed = output is None and number is None and chosen is not Format.HTML
    loaded = _load(runs) if unnamed else []
    target = output or Path(_default_name(chosen, number, loaded))
    if target != _STDOUT:
        check_output(target, force=force)
    epoch = "last" if last else "best"
    if demo:
        from reports.demo import demo_runs
        from reports.page import build_page

        _write(target, build_page(demo_runs(), title=title, layers=wanted), "made-up runs")
    elif watch:
        render = _renderer(chosen, wanted, title, number, epoch)
        _Watch(runs, target, render, interval).until_all_ended(open_page)
        return
    else:
        render = _renderer(chosen, wanted, title, number, epoch)
        loaded = loaded or _load(runs)
        _write(target, render(loaded), _plural(len(loaded), "run"))
    if open_page:
        _open(target)


def _check_together(
    runs: list[Path],
    chosen: Format,
    target: Path | None,
    number: int | None,
    *,
    demo: bool,
    watch: bool,
    open_page: bool,
) -> None:
    """Raise ConfigurationError for options that do not go together."""
    if demo and (runs or watch or chosen is not Format.HTML):
        other = "RUNS" if runs else "--watch" if watch else f"--format {chosen}"
        raise ConfigurationError(f"--demo makes up a page of its own: leave {other} away")
    if not runs and not demo:
        raise ConfigurationError("RUNS is missing: name run directories, or use --demo")
    if target == _STDOUT and (open_page or watch):
        other = "--watch" if watch else "--open"
        raise ConfigurationError(f"--output -: {other} needs a file; name one, or leave it away")
    if number is not None and chosen is Format.HTML:
        raise ConfigurationError(
            "--table: a page has all tables; choose --format latex, csv or json"
        )
    if open_page and chosen is not Format.HTML:
        raise ConfigurationError(f"--open opens a page, not --format {chosen}: leave one away")


def _format(given: Format | None, output: Path | None) -> Format:
    """Return what to write; ConfigurationError where --output ends in what it would not be."""
    ending = "" if output is None else output.suffix.lower()
    of_ending = _FORMATS.get(ending)
    if given is not None:
        if of_ending not in (None, given):
            raise ConfigurationError(
                f"--output {output} ends in {ending}, and --format is {given}: leave one away"
            )
        return given
    if ending and of_ending is None:
        raise ConfigurationError(
            f"--output {output}: no {ending} file can be written; end the name in "
            f"{', '.join(_ENDINGS.values())}, or choose a --format"
        )
    return of_ending or Format.HTML


def _default_name(chosen: Format, number: int | None, runs: "list[Run]") -> str:
    if chosen is Format.HTML:
        return "report.html"
    from reports.exports import default_table

    return f"table{number or default_table(runs)}{_ENDINGS[chosen]}"


def _layers(text: str | None) -> list[int | str] | None:
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ConfigurationError(f"--layers is {text!r}; name layers, separated by commas")
    return [int(name) if name.isdecimal() else name for name in names]


def _renderer(
    chosen: Format,
    wanted: list[int | str] | None,
    title: str | None,
    number: int | None,
    epoch: str,
) -> "Callable[[list[Run]], str]":
    """Return the function from runs to the text of the file."""
    from reports.summary import Epoch

    if chosen is Format.HTML:
        from reports.page import build_page

        return lambda runs: build_page(runs, title=title, layers=wanted, epoch=Epoch(epoch))
    from reports.exports import export_table

    return lambda runs: export_table(runs, chosen.value, number, Epoch(epoch))


def _load(paths: list[Path]) -> "list[Run]":
    from pgt_diag.run import find_runs, load_run

    return [load_run(path) for path in find_runs(paths)]


def _write(target: Path, text: str, said: str) -> None:
    """Write the file and say so in one line."""
    from commands import terminal
    from reports.output import write_output

    if target == _STDOUT:
        terminal.write_out(text)
        return
    write_output(target, text)
    size = len(text.encode("utf-8", "replace"))
    shown = f"{size / 1e6:.1f} MB" if size >= 50_000 else f"{size / 1e3:.1f} kB"
    terminal.say(f"{target} ({shown}, {said})")


def _open(target: Path) -> None:
    from commands.browser import open_page
    from commands.terminal import say

    if reason := open_page(target):
        say(f"not opened: {reason}; copy {target} to where there is a browser", stderr=True)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s'[: count != 1]}"


class _Watch:
    """Rebuilds a report while its runs go on."""

    def __init__(
        self,
        paths: list[Path],
        target: Path,
        render: "Callable[[list[Run]], str]",
        interval: float,
    ) -> None:
        self._paths = paths
        self._target = target
        self._render = render
        self._interval = interval
        self._built: dict[Path, float] = {}
        self._warned: set[Path] = set()

    def until_all_ended(self, open_page: bool) -> None:
        """Build at once, and again whenever something new is on disk.

        Runs that appear in a folder meanwhile join. Raises what the first build raises; a later
        one that fails is told, and tried again.
        """
        from commands.terminal import say

        running = self._rebuild()
        if open_page:
            _open(self._target)
        while running:
            time.sleep(self._interval)
            try:
                running = self._rebuild()
            except PgtDiagError as error:
                say(f"not rebuilt: {' '.join(str(error).split())}", stderr=True)

    def _rebuild(self) -> int:
        """Build if something is new; return how many runs still go on."""
        from pgt_diag.run import find_runs, load_run
        from reports.follow import last_write

        written = {path: last_write(path) for path in find_runs(self._paths)}
        loaded = [load_run(path) for path in written]
        running = [run for run in loaded if run.status == "running"]
        if written != self._built:
            iterations = _plural(max(run.iteration_count for run in loaded), "iteration")
            going = f"{len(running)} still running" if running else "all ended"
            said = f"{_plural(len(loaded), 'run')}, {iterations}, {going}"
            _write(self._target, self._render(loaded), said)
            self._built = written
        self._warn_of_silence(running)
        return len(running)

    def _warn_of_silence(self, running: "list[Run]") -> None:
        """Say once that a run has stopped writing: killed, it would be waited for for ever."""
        from commands.terminal import say
        from reports.follow import STALL_SECONDS

        now = time.time()
        silent = {run.path: now - self._built[run.path] for run in running}
        silent = {path: seconds for path, seconds in silent.items() if seconds > STALL_SECONDS}
        for path, seconds in silent.items():
            if path not in self._warned:
                say(f"{path}: no new data since {seconds:,.0f} s; still waiting, Ctrl-C ends")
        self._warned = set(silent)
