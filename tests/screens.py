"""A real pseudo-terminal of a chosen width: what a person sees there is read back."""

import contextlib
import copy
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import pyte

WIDTHS = (120, 100, 80, 60)
_ALTERNATE_SCREEN = 1049
_SECONDS = 120.0


class Screen(pyte.HistoryScreen):
    """Follows the alternate screen, which pyte does not know."""

    def set_mode(self, *modes: int, **how: Any) -> None:
        super().set_mode(*modes, **how)
        if _ALTERNATE_SCREEN in modes:
            self._main = copy.deepcopy(self.buffer), self.cursor.y, self.cursor.x
            self._above = list(self.history.top)
            self.erase_in_display(2)

    def reset_mode(self, *modes: int, **how: Any) -> None:
        super().reset_mode(*modes, **how)
        if _ALTERNATE_SCREEN in modes:
            self.buffer, self.cursor.y, self.cursor.x = self._main
            self.history.top.clear()
            self.history.top.extend(self._above)

    @property
    def text(self) -> list[str]:
        """Every line, also those that have left at the top, without blanks at their ends."""
        above = ["".join(line[x].data for x in range(self.columns)) for line in self.history.top]
        lines = [line.rstrip() for line in [*above, *self.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines


def on_terminal(
    run: Callable[[], int],
    columns: int,
    lines: int = 40,
    *,
    typed: Mapping[str, bytes] | None = None,
    **environment: str,
) -> tuple[Screen, int]:
    """Call `run` in a child that has a terminal; return the screen at its end, and its exit code.

    typed: keys to press, each as soon as the screen shows a text. A fork, because torch and pandas
    take seconds to import; so `run` may not train.
    """
    child, terminal = pty.fork()
    if child == 0:
        _be_child(run, columns, lines, environment)
    screen = Screen(columns, lines, history=1000)
    stream, left = pyte.ByteStream(screen), dict(typed or {})
    deadline = time.monotonic() + _SECONDS
    try:
        while True:
            if not select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                raise TimeoutError("\n".join(screen.text))
            with contextlib.suppress(OSError):  # how Linux tells that the other end is closed
                if output := os.read(terminal, 1 << 16):
                    stream.feed(output)
                    for text in [text for text in left if text in "\n".join(screen.text)]:
                        os.write(terminal, left.pop(text))
                    continue
            return screen, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(terminal)


def _be_child(
    run: Callable[[], int], columns: int, lines: int, environment: dict[str, str]
) -> None:
    code = 70
    try:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ.update(TERM="xterm-256color", **environment)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, "rww"[fd]) for fd in range(3))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever trained has changed it
        code = run()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def broken_words(screen: Screen, plain: str) -> list[str]:
    """Return the words of an output without a terminal that are on no line of the screen whole."""
    shown = {word for line in screen.text for word in line.split()}
    return [word for word in plain.split() if len(word) <= screen.columns and word not in shown]
