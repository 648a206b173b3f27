"""Text that came from elsewhere (names, paths, messages), made safe to show to people."""

import os
import shlex
import unicodedata
from collections.abc import Iterable

MAX_LABEL = 48


def printable(text: object, limit: int = MAX_LABEL) -> str:
    """Return text on one line, without control or direction characters, at most `limit` long."""
    shown = "".join(
        "�" if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") else sign
        for sign in str(text)
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def quoted(words: Iterable[object]) -> str:
    """Return a command line that does the same when it is copied from a terminal into a shell.

    A word with signs that `printable` replaces is written as bash, zsh and ksh read it: $'…'.
    """
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word: str) -> str:
    if printable(word, len(word)) == word:
        return shlex.quote(word)
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in "'\\"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"
