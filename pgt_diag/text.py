"""Text that came from elsewhere (names, paths, messages), made safe to show to people."""

import unicodedata

MAX_LABEL = 48


def printable(text: object, limit: int = MAX_LABEL) -> str:
    """Return text on one line, without control or direction characters, at most `limit` long."""
    shown = "".join(
        "�" if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") else sign
        for sign in str(text)
    )
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
