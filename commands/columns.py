"""Tables that fit the terminal: what does not is left out, column by column, and said to be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from commands.terminal import table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_FOLDED = 12
"""The narrowest that a column of sentences is made, in characters."""


@dataclass(frozen=True)
class Column:
    """A column, its cells as markup.

    rank: 0 for one that stays whatever happens; of the others the highest leaves first.
    folds: its cells are sentences, and may go over several lines.
    """

    name: str
    cells: Sequence[str]
    right: bool = True
    rank: int = 0
    folds: bool = False


def fitting_table(
    screen: "Console",
    title: str | None,
    columns: Sequence[Column],
    *,
    styles: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> "tuple[Table, list[str]]":
    """Return a table no wider than the screen, and the names of the columns it has no room for.

    styles: of each row. ends: the rows after which a section ends. No cell is cut; a name is
    folded between its words.
    """
    kept = list(columns)
    while True:
        widths = [_needed(column) for column in kept]
        spare = screen.width - _width(screen, _made(screen, title, kept, widths, styles, ends))
        leaving = max(kept, key=lambda column: column.rank)
        if spare >= 0 or not leaving.rank:
            break
        kept.remove(leaving)
    for place, column in enumerate(kept):
        wider = min(max(0, spare), _whole(column) - widths[place])
        widths[place], spare = widths[place] + wider, spare - wider
    left_out = [column.name for column in columns if column not in kept]
    return _made(screen, title, kept, widths, styles, ends), left_out


def spare_room(screen: "Console", columns: Sequence[Column]) -> int:
    """Return how wide another column beside these could be."""
    empty = Column("", [""] * len(columns[0].cells))
    widths = [*map(_needed, columns), 0]
    return screen.width - _width(screen, _made(screen, None, [*columns, empty], widths, (), ()))


def _made(
    screen: "Console",
    title: str | None,
    columns: Sequence[Column],
    widths: Sequence[int],
    styles: Sequence[str],
    ends: Sequence[int],
) -> "Table":
    made = table(screen, title)
    for column, width in zip(columns, widths, strict=True):
        made.add_column(column.name, justify="right" if column.right else "left", width=width)
    for place, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        style = styles[place] if styles else None
        made.add_row(*cells, style=style, end_section=place in ends)
    return made


def _width(screen: "Console", made: "Table") -> int:
    from rich.measure import Measurement

    made.title = None
    return Measurement.get(screen, screen.options.update(max_width=100_000), made).maximum


def _needed(column: Column) -> int:
    """Return how wide a column has to be."""
    words = max(map(len, column.name.split()), default=0)
    cells = max(map(_length, column.cells), default=0)
    return max(words, min(cells, _FOLDED) if column.folds else cells)


def _whole(column: Column) -> int:
    """Return how wide a column would like to be."""
    return max(len(column.name), *map(_length, column.cells), 0)


def _length(markup: str) -> int:
    from rich.text import Text

    return Text.from_markup(markup).cell_len
