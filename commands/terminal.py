"""What the commands that only read have in common: a console, safe text, sparklines, durations.

Everything that came with a run goes through `safe` before it is printed: control characters would
act on the terminal, and rich reads markup in square brackets.
"""

import os
import sys
from collections.abc import Sequence

from rich import box
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
    tolerate(stream)
    wide = None if stream.isatty() else int(os.environ.get("COLUMNS") or PLAIN_WIDTH)
    return Console(file=stream, highlight=False, width=wide, emoji=False)


def tolerate(stream: object) -> None:
    """Let a stream print what its encoding lacks as a question mark, instead of failing."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def safe(text: object, limit: int = _MAX_LABEL) -> str:
    """Return text for rich: on one line, control characters visible, markup as it is."""
    from pgt_diag.text import printable

    return escape(printable(text, limit))


def say(text: str, *, stderr: bool = False) -> None:
    """Print one plain line at once."""
    from pgt_diag.text import printable

    stream = sys.stderr if stderr else sys.stdout
    tolerate(stream)
    print(printable(text, 10_000), file=stream, flush=True)


def write_out(text: str) -> None:
    """Write a whole document to standard output; a reader that stops early is no error."""
    tolerate(sys.stdout)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
