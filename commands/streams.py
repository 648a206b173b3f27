"""Standard streams as commands may find them: closed, full, left by their reader, of another
encoding, of no width.
"""

import io
import os
import stat
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_left: set[int] = set()
"""The streams, by number, that nobody reads any more."""

_WIDTHS = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
_WIDEST = 10_000


def make_safe() -> None:
    """Let every command print to whatever standard output and standard error are.

    A closed one becomes the null device, a sign that the encoding lacks a question mark, what a
    reader such as `head` no longer reads is dropped, and a width that is none is forgotten: what
    prints reads these itself, and some fail or print nothing.
    """
    _fill_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif hasattr(stream, "reconfigure"):
            with suppress(OSError):  # a pipe has taken the place of the file that it was
                stream.reconfigure(errors="replace")
            setattr(sys, name, _outliving_its_reader(stream))
    for name in _WIDTHS:
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= _WIDEST):
            os.environ.pop(name, None)


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more."""
    return 1 in _left


def _outliving_its_reader(stream: TextIO) -> TextIO:
    """Return the stream; in the place of a pipe or socket, one whose reader may go."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):  # no file
        return stream
    ours = isinstance(getattr(stream.buffer, "raw", None), _Pipe)
    if ours or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=bool(stream.line_buffering),
    )


class _Pipe(io.FileIO):
    """Writes into nothing once nobody reads: a training run goes on without."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _left.add(self.fileno())
            _discard(self.fileno())
            return memoryview(data).nbytes


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
            _discard_all(stream)
        except OSError as error:
            _discard_all(stream)
            found = error
    return found


def _discard_all(stream: TextIO) -> None:
    with suppress(OSError):  # what stands in a stream's place in a test has no number
        _discard(stream.fileno())


def _discard(number: int) -> None:
    """Have a stream write to the null device from now on."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, number)
    os.close(nothing)
