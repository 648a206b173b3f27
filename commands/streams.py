"""Standard streams as commands may find them: closed, full, of another encoding, of no width."""

import os
import sys
from contextlib import suppress
from typing import TextIO

_WIDTHS = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
_WIDEST = 10_000


def make_safe() -> None:
    """Let every command print to whatever standard output and standard error are.

    A closed one becomes the null device, a sign that the encoding lacks a question mark, and a
    width that is none is forgotten: what prints reads these itself, and some fail or print nothing.
    """
    _fill_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for name in _WIDTHS:
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= _WIDEST):
            os.environ.pop(name, None)


def _fill_closed() -> None:
    """Open what is closed: the next file to be opened would take its place, and get the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def flush() -> OSError | None:
    """Put out what is still to be printed; return the error where that is not possible.

    Python would tell it once more, at its end. A reader that stopped early is no error.
    """
    found = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _give_up(stream)
        except OSError as error:
            _give_up(stream)
            found = error
    return found


def _give_up(stream: TextIO) -> None:
    with suppress(OSError):  # what stands in a stream's place in a test has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
