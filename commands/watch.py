"""`pgt-diag watch`: follow a run that goes on, layer by layer."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from reports.follow import Follower, Snapshot

EPILOG = """\b
Examples:
  pgt-diag watch runs/pgt                   until the run ends, or Ctrl-C
  pgt-diag watch runs/pgt --interval 30 >> watch.log
  pgt-diag watch runs/pgt --once            how it stands now

Ends with 0 when the run has finished, 1 when it diverged, failed or was interrupted.
"""

_FRAME_LINES = 8


def watch(
    run: Path = typer.Argument(help="Run directory."),
    interval: float = typer.Option(2.0, min=0.1, help="Seconds between two looks."),
    once: bool = typer.Option(False, "--once", help="Look once, print, and end."),
) -> None:
    """Follow a running run: dead filters of every layer, rate, time left."""
    # Late, so that a mistyped option is answered before pandas is loaded.
    from commands import terminal
    from reports.follow import Follower

    screen = terminal.console()
    looks = _looks(Follower(run), interval, once)
    last = _live(screen, looks) if screen.is_terminal and not once else _lines(screen, looks)
    if not last.running:
        terminal.say(_ending(last, run))
        if last.status != "finished":
            raise typer.Exit(1)


def _looks(follower: "Follower", interval: float, once: bool) -> "Iterator[Snapshot]":
    """Yield the run as it stands, every so often, until it has ended."""
    while True:
        snapshot = follower.look(time.time())
        yield snapshot
        if once or not snapshot.running:
            return
        time.sleep(interval)


def _live(screen: "Console", looks: "Iterator[Snapshot]") -> "Snapshot":
    from rich.live import Live

    with Live(console=screen, auto_refresh=False) as live:
        for snapshot in looks:
            live.update(_frame(screen, snapshot), refresh=True)
    return snapshot


def _lines(screen: "Console", looks: "Iterator[Snapshot]") -> "Snapshot":
    """Print a line whenever something is new, and the layers at the end."""
    said = None
    for snapshot in looks:
        news = (snapshot.iterations, snapshot.status, snapshot.stalled)
        if news != said:
            screen.print(_progress(snapshot), soft_wrap=True)
        said = news
    screen.print(_layer_table(screen, snapshot, len(snapshot.layers)))
    return snapshot


def _frame(screen: "Console", snapshot: "Snapshot") -> "Group":
    """Return what the terminal shows: a bar, numbers, and as many layers as fit."""
    from rich.console import Group, RenderableType
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    from commands.terminal import safe

    head: list[RenderableType] = [
        Text.from_markup(f"[bold]{safe(snapshot.name)}[/] {safe(snapshot.status)}")
    ]
    if snapshot.planned:
        head.append(ProgressBar(snapshot.planned, snapshot.iterations, width=60))
    room = max(3, screen.height - _FRAME_LINES)
    numbers = Text.from_markup(_progress(snapshot))
    return Group(*head, numbers, Text(), _layer_table(screen, snapshot, room))


def _progress(snapshot: "Snapshot") -> str:
    """Return the numbers on one line, as markup."""
    from commands.terminal import duration

    planned = snapshot.planned
    done = f"iteration {snapshot.iterations:,}"
    if planned:
        done += f" of {planned:,} ({100 * snapshot.iterations / planned:.1f} %)"
    parts = [done]
    if snapshot.loss is not None:
        parts.append(f"loss {snapshot.loss:.4f}")
    if snapshot.stalled:
        parts.append(f"[bold yellow]no new data since {snapshot.silent_for:,.0f} s[/]")
    elif snapshot.running and snapshot.iterations_per_second:
        rate = f"{snapshot.iterations_per_second:.3g} iterations/s"
        if snapshot.images_per_second:
            rate += f", {snapshot.images_per_second:,.0f} images/s"
        parts.append(rate)
        if snapshot.seconds_left is not None:
            parts.append(f"{duration(snapshot.seconds_left)} left")
    unknown = f", {snapshot.unknown:,} unknown" if snapshot.unknown else ""
    dead = f"{snapshot.dead:,} of {snapshot.filters:,} filters dead{unknown}"
    return " · ".join([*parts, dead])


def _layer_table(screen: "Console", snapshot: "Snapshot", room: int) -> "Table":
    """Return the layers as rows; where not all fit, those with the most dead filters."""
    from commands.terminal import safe, sparkline, table

    made = table(screen)
    made.add_column("#", justify="right")
    made.add_column("layer")
    made.add_column("dead", justify="right")
    made.add_column("over time", no_wrap=True)
    layers = snapshot.layers
    hidden = max(0, len(layers) - room)
    most = sorted(layers, key=lambda layer: layer.dead, reverse=True)[: len(layers) - hidden]
    for layer in sorted(most, key=lambda layer: layer.index):
        dead = f"{layer.dead:,} / {layer.filters:,}"
        dead += f", {layer.unknown:,} unknown" if layer.unknown else ""
        bars = sparkline(layer.history, max(layer.history, default=0))
        made.add_row(str(layer.index), safe(layer.name), dead, bars)
    if hidden:
        made.add_row("", f"and {hidden} more layers", "", "")
    return made


def _ending(snapshot: "Snapshot", run: Path) -> str:
    """Return the last line: how the run ended, and what to do next."""
    reason = f": {snapshot.message}" if snapshot.message else ""
    return (
        f"{snapshot.status}{reason} after {snapshot.iterations:,} iterations, {snapshot.dead:,} of "
        f"{snapshot.filters:,} filters dead; next: pgt-diag report {run}"
    )
