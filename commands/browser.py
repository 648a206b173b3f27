"""Opening a page in a browser: which command does so here, or why none can."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "firefox",
    "firefox-esr",
    "microsoft-edge",
    "brave-browser",
    "epiphany",
    "konqueror",
)
_WAIT_SECONDS = 3.0
"""An opener that fails has done so by then; one that is the browser itself runs on."""


@dataclass(frozen=True)
class Opener:
    """The command that opens a page, empty where there is none, and what was found, in words."""

    command: tuple[str, ...]
    found: str


def find_opener() -> Opener:
    """Return what opens a page here: $BROWSER, the system's opener, or a browser itself."""
    if sys.platform == "darwin":
        return Opener(("open",), "open")
    # A remote editor sets it to what opens the page on the person's own machine, without a display.
    for wanted in os.environ.get("BROWSER", "").split(os.pathsep):
        words = shlex.split(wanted.replace("%s", ""))
        if words and shutil.which(words[0]):
            return Opener(tuple(words), f"{words[0]}, of BROWSER")
    browser = next(filter(shutil.which, _BROWSERS), None)
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        what = f"{browser} is installed, but" if browser else "no browser, and"
        return Opener((), f"{what} there is no display to show a page on")
    if shutil.which("xdg-open"):
        return Opener(("xdg-open",), f"xdg-open{f', {browser}' if browser else ''}")
    if browser:
        return Opener((browser,), browser)
    return Opener((), "no browser is installed")


def open_page(path: Path) -> str | None:
    """Open a page; return why not, if not. What the browser prints is not shown."""
    opener = find_opener()
    if not opener.command:
        return opener.found
    try:
        process = subprocess.Popen(
            [*opener.command, path.resolve().as_uri()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return f"{opener.command[0]}: {error.strerror or error}"
    with contextlib.suppress(subprocess.TimeoutExpired):
        if code := process.wait(_WAIT_SECONDS):
            return f"{opener.command[0]} found no browser, or failed (exit code {code})"
    return None
