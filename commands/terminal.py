"""What the commands that only read have in common: a console, safe text, sparklines, durations.

Everything that came with a run goes through `safe` before it is printed: control characters would
act on the terminal, and rich reads markup in square brackets.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import IO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 200
"""Columns where nobody looks: lines in a file or a pipe are not to be folded."""

_BARS = " ▁▂▃▄▅▆▇█"
_MAX_LABEL = 48


def console(*, stderr: bool = False) -> Console:
    """Return a console: colours on a terminal that wants them, plain wide lines elsewhere."""
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() else int(os.environ.get("COLUMNS") or PLAIN_WIDTH)
    return Console(file=stream, highlight=False, width=wide, emoji=False)


def safe(text: object, limit: int = _MAX_LABEL) -> str:
    """Return text for rich: on one line, control characters visible, markup as it is."""
    from pgt_diag.text import printable

    return escape(printable(text, limit))


def shortened(text: object, limit: int = _MAX_LABEL) -> str:
    """Return text for rich as `safe` does, what is too long cut in its middle.

    Names of layers and of runs differ at either end.
    """
    from pgt_diag.text import printable

    shown = printable(text, 10_000)
    head = (limit - 1) // 2
    tail = limit - 1 - head
    return escape(shown if len(shown) <= limit else f"{shown[:head]}…{shown[-tail:]}")


def say(text: str, command: str = "", *, stderr: bool = False) -> None:
    """Print a plain line at once, folded between words on a terminal; see `folded`."""
    from pgt_diag.text import printable

    stream = sys.stderr if stderr else sys.stdout
    print(
        folded(stream, printable(text, 10_000), printable(command, 10_000)),
        file=stream,
        flush=True,
    )


def folded(stream: IO[str], text: str, command: str = "", *, name: str = "") -> str:
    """Return text, after a name and before a command, as they are printed to `stream`.

    A line for what reads lines. On a terminal it is folded between words beside its name, and no
    word is broken; a command that does not fit beside the text has a line of its own, to be
    copied whole.
    """
    line = f"{name}{text} {command}" if command else f"{name}{text}"
    if not stream.isatty() or cell_len(line) <= (width := columns(stream)):
        return line
    lines = between_words(f"{name}{text}", width, indent=len(name))
    return f"{lines}\n  {command}" if command else lines


def between_words(text: str, width: int, indent: int = 0) -> str:
    """Return text with a new line in the place of some of its spaces; no word is broken.

    indent: blanks that every line but the first begins with.
    """
    lines, line = [], ""
    for word in text.split(" "):
        if line.strip() and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = " " * indent + word
        else:
            line = f"{line} {word}" if line or lines else word
    return "\n".join([*lines, line])


def columns(stream: IO[str]) -> int:
    """Return how wide the terminal is that a stream writes to."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        width = 0
    return width or shutil.get_terminal_size().columns


def packed(parts: Sequence[str], width: int, separator: str = " · ") -> list[str]:
    """Return lines of whole parts, each as long as fits `width`."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
        else:
            lines.append(part)
    return lines


def fitted(text: str, room: int, first_to_go: Sequence[str]) -> str:
    """Return text, whole where there is room for it, else without some of its ', ' parts.

    Those that contain one of `first_to_go` leave, in that order, until the rest fits.
    """
    parts = text.split(", ")
    for unit in first_to_go:
        if len(", ".join(parts)) <= room:
            break
        parts = [part for part in parts if unit not in part]
    return ", ".join(parts)


def write_out(text: str) -> None:
    """Write a whole document to standard output, in UTF-8 as in a file."""
    if not hasattr(sys.stdout, "buffer"):  # text alone stands in its place, as in a notebook
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def table(screen: Console, title: str | None = None) -> Table:
    """Return a table that is ruled on a terminal and plain columns elsewhere."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if screen.is_terminal else None,
        header_style="bold" if screen.is_terminal else "",
        pad_edge=False,
        collapse_padding=True,
    )


def sparkline(values: Sequence[int], top: int | None = None) -> str:
    """Return a bar per value, from blank at 0 to full at `top` (the largest); 1 is visible."""
    scale = (len(_BARS) - 1) / max(top or 0, *values, 1) if values else 0
    return "".join(_BARS[max(1, round(scale * value)) if value > 0 else 0] for value in values)


def duration(seconds: float) -> str:
    """Return 0:42, 12:05 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
