"""`pgt-diag watch`: follow a run that goes on, layer by layer, or a sweep, run by run."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from commands.streams import reader_is_gone

if TYPE_CHECKING:
    from rich.console import Console

    from commands.watch_frames import View

EPILOG = """\b
Examples:
  pgt-diag watch runs/pgt                   until the run ends, or Ctrl-C
  pgt-diag watch sweeps/table2-smoke        every run of a sweep, or of a folder
  pgt-diag watch runs/pgt --interval 30 >> watch.log
  pgt-diag watch runs/pgt --once            how it stands now

Ends with 0 when the run, or every run of a sweep, has finished; 1 when one diverged, failed, was
interrupted, or was never made.
"""


def watch(
    run: Path = typer.Argument(help="Run directory, or a folder of runs, such as a sweep's."),
    interval: float = typer.Option(2.0, min=0.1, help="Seconds between two looks."),
    once: bool = typer.Option(False, "--once", help="Look once, print, and end."),
) -> None:
    """Follow a running run or sweep: dead filters, rate, time left."""
    # Late, so that a mistyped option is answered before pandas is loaded.
    from commands import terminal
    from commands.watch_frames import RunView
    from commands.watch_sweep import SweepView
    from reports.follow_sweep import is_folder_of_runs

    screen = terminal.console()
    view: View[Any] = SweepView(run) if is_folder_of_runs(run) else RunView(run)
    looks = _looks(view, interval, once)
    try:
        if screen.is_terminal and not screen.is_dumb_terminal:
            _live(screen, view, looks, once)
        else:
            _lines(screen, view, looks)
    except KeyboardInterrupt:
        terminal.say("stopped watching; what is running goes on", stderr=True)
        raise
    if not view.running:
        terminal.say(*view.ending())
        if not view.finished:
            raise typer.Exit(1)


def _looks(view: "View[Any]", interval: float, once: bool) -> Iterator[None]:
    """Look every so often, until what is looked at has ended."""
    while True:
        view.look(time.time())
        yield
        if once or not view.running or reader_is_gone():
            return
        time.sleep(interval)


def _live(screen: "Console", view: "View[Any]", looks: Iterator[None], once: bool) -> None:
    """Show it on a screen of its own while it goes on, and then leave it behind as it stood."""
    from rich.live import Live

    next(looks)
    try:
        if view.running and not once:
            with Live(console=screen, auto_refresh=False, screen=True) as live:
                live.update(view.frame(screen), refresh=True)
                for _ in looks:
                    live.update(view.frame(screen), refresh=True)
    finally:
        screen.print(view.frame(screen))


def _lines(screen: "Console", view: "View[Any]", looks: Iterator[None]) -> None:
    """Print a line whenever something is new, and the table at the end."""
    said = None
    for _ in looks:
        if view.news() != said:
            screen.print(view.line(), soft_wrap=True)
        said = view.news()
    screen.print(view.table(screen, None))
