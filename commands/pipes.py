"""A reader that stops early, such as `head`, is no error: what it no longer reads is dropped."""

import io
import os
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_gone: set[int] = set()


def forgive_closed_pipes() -> None:
    """Let standard output and error outlive their reader: a training run goes on without.

    Called once, where the process begins. Only pipes and sockets can lose their reader.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            mode = os.fstat(stream.fileno()).st_mode
        except (AttributeError, OSError, ValueError):  # closed, or no file
            continue
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            stream.flush()
            raw = _Pipe(stream.fileno(), "w", closefd=False)
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more."""
    return 1 in _gone


class _Pipe(io.FileIO):
    """Writes into nothing once nobody reads."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _gone.add(self.fileno())
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return memoryview(data).nbytes
