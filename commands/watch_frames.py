"""What `pgt-diag watch` shows: how a run stands, layer by layer. `watch_sweep` has a sweep."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from commands.columns import Column, fitting_table, spare_room
from commands.terminal import duration, packed, safe, shortened, sparkline
from pgt_diag.config import as_typed
from pgt_diag.text import quoted
from reports.follow import Follower, LayerNow, Snapshot

_BARS = (8, 32)
"""The fewest and the most columns that a course over time is drawn in."""

MAX_LINE = 2000
_SILENT = "no new data"
_TABLE_LINES = 6
"""Lines of a table besides its rows, the line after it, and where the cursor rests."""


class _Snapshot(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def running(self) -> bool: ...


S = TypeVar("S", bound=_Snapshot)


class View(ABC, Generic[S]):
    """How a run, or a folder of runs, stood at the newest look, and how that is shown."""

    _now: S

    def __init__(self, path: Path, look: Callable[[float], S]) -> None:
        self._path = path
        self._look = look

    def look(self, now: float) -> None:
        """See how it stands at `now`, seconds since the epoch."""
        self._now = self._look(now)

    @property
    def running(self) -> bool:
        """Whether it goes on; of a folder, whether a run does or the sweep is between two."""
        return self._now.running

    @property
    def finished(self) -> bool:
        """Whether it has come to a good end."""
        return self._now.status == "finished"

    def head(self) -> str:
        """Return its name and how it stands, as markup."""
        return f"[bold]{safe(self._now.name)}[/] {safe(self._now.status)}"

    @abstractmethod
    def share(self) -> tuple[float, float] | None:
        """Return how much is done, and of how much, where that is known."""

    @abstractmethod
    def numbers(self) -> list[str]:
        """Return the rest that is told of it, each fit to stand on a line of its own."""

    @abstractmethod
    def news(self) -> object:
        """Return what differs when there is something new to print."""

    @abstractmethod
    def table(self, screen: Console, room: int | None) -> Table:
        """Return its parts in at most so many rows, None for all."""

    @abstractmethod
    def ending(self) -> tuple[str, str]:
        """Return how it ended, and the command that comes next."""

    def line(self) -> str:
        """Return it on one line, for what reads lines."""
        return safe(" · ".join(self.numbers()), MAX_LINE)

    def frame(self, screen: Console) -> Group:
        """Return what a terminal shows, no line longer than its width."""
        parts: list[RenderableType] = [Text.from_markup(self.head())]
        if (share := self.share()) is not None:
            done, all_of = share
            # A bar alone ends without a new line.
            parts.append(Padding(ProgressBar(all_of, done, width=min(60, screen.width)), 0))
        for line in packed(self.numbers(), screen.width):
            style = "bold yellow" if _SILENT in line else ""
            parts.append(Text.from_markup(safe(line, MAX_LINE), style=style))
        room = max(3, screen.height - len(parts) - _TABLE_LINES)
        return Group(*parts, self.table(screen, room))


class RunView(View[Snapshot]):
    """A run, by layer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Follower(path).look)

    def share(self) -> tuple[float, float] | None:
        """Return how many iterations are made, and are planned."""
        planned = self._now.planned
        return (self._now.iterations, planned) if planned else None

    def numbers(self) -> list[str]:
        """Return iteration, loss, rate, time left and dead filters."""
        return [iteration_of(self._now), *numbers_of(self._now)]

    def news(self) -> object:
        """Return what differs when there is something new to print."""
        return self._now.iterations, self._now.status, self._now.stalled

    def table(self, screen: Console, room: int | None) -> Table:
        """Return the layers; where not all fit, those with the most dead filters."""
        layers = list(self._now.layers)
        most = sorted(layers, key=lambda layer: layer.dead, reverse=True)[: rows_in(layers, room)]
        shown = [layer for layer in layers if layer in most]
        hidden = len(layers) - len(shown)
        more = [f"and {hidden} more layers"] * bool(hidden)
        blank = [""] * len(more)
        columns = [
            Column("#", [str(layer.index) for layer in shown] + blank),
            Column("layer", [shortened(layer.name) for layer in shown] + more, right=False),
            Column("dead", [_dead_of(layer) for layer in shown] + blank),
        ]
        bars = min(_BARS[1], spare_room(screen, columns))
        if bars >= _BARS[0]:
            courses = [_course(layer, bars) for layer in shown]
            columns.append(Column("over time (█ all dead)", courses + blank, right=False))
        return fitting_table(screen, None, columns)[0]

    def ending(self) -> tuple[str, str]:
        """Return how it ended, and the command that comes next."""
        now = self._now
        reason = f": {as_typed(now.message)}" if now.message else ""
        text = (
            f"{now.status}{reason} after {now.iterations:,} iterations, {_dead_filters(now)}; next:"
        )
        return text, f"pgt-diag report {quoted([self._path])}"


def iteration_of(now: Snapshot) -> str:
    """Return where a run stands in its iterations."""
    if not now.planned:
        return f"iteration {now.iterations:,}"
    percent = 100 * now.iterations / now.planned
    return f"iteration {now.iterations:,} of {now.planned:,} ({percent:.1f} %)"


def numbers_of(now: Snapshot) -> list[str]:
    """Return a run's loss, rate, time left and dead filters, so far as they are known."""
    parts = [] if now.loss is None else [f"loss {now.loss:.4f}"]
    if now.stalled:
        parts.append(f"{_SILENT} since {now.silent_for:,.0f} s")
    elif now.running and now.iterations_per_second:
        rate = f"{now.iterations_per_second:.3g} iterations/s"
        if now.images_per_second:
            rate += f", {now.images_per_second:,.0f} images/s"
        parts.append(rate)
        if now.seconds_left is not None:
            parts.append(f"{duration(now.seconds_left)} left")
    return [*parts, _dead_filters(now)]


def _dead_filters(now: Snapshot) -> str:
    unknown = f", {now.unknown:,} unknown" if now.unknown else ""
    return f"{now.dead:,} of {now.filters:,} filters dead{unknown}"


def _dead_of(layer: LayerNow) -> str:
    unknown = f", {layer.unknown:,} unknown" if layer.unknown else ""
    return f"{layer.dead:,} / {layer.filters:,}{unknown}"


def rows_in(parts: Sequence[object], room: int | None) -> int:
    """Return how many parts are shown; where some are not, a line says so."""
    return len(parts) if room is None or len(parts) <= room else room - 1


def _course(layer: LayerNow, width: int) -> str:
    """Return a layer's dead filters over time; every layer on the same scale, of all its filters.

    The last column is now.
    """
    history = layer.history
    places = [(place + 1) * len(history) // width - 1 for place in range(width)]
    chosen = history if len(history) <= width else [history[place] for place in places]
    return sparkline(chosen, layer.filters)
