"""Putting a report on disk: whole or not at all, and never over somebody else's file."""

import errno
import os
from pathlib import Path

from pgt_diag.errors import ConfigurationError, NoSpaceError, PgtDiagError
from reports.exports import LATEX_MARKS

_HEAD = 4096
_MARKS = (
    '<meta name="generator" content="pgt-diag',
    *LATEX_MARKS,
    "setting,batch_size,method,",
    "setting,model,schedule,",
    '[\n  {\n    "setting": ',
)
"""What our pages and tables have near their beginning, and hardly any other file."""


def check_output(path: Path, *, force: bool = False) -> None:
    """Raise ConfigurationError unless a report can be written at `path`.

    An existing file must be empty or a report of pgt-diag's own, unless `force`.
    """
    try:
        if path.is_dir():
            raise ConfigurationError(f"--output {path}: is a folder; name a file")
        if force or not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(_HEAD).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError as error:
        raise _unwritable(path, error) from None
    if head and not any(mark in head for mark in _MARKS):
        raise ConfigurationError(
            f"--output {path}: exists and is no report of pgt-diag; name another file, or replace "
            "it with --force"
        )


def write_output(path: Path, text: str) -> None:
    """Write a report, making its folder; a regular file is replaced in one step.

    Raises ConfigurationError when it cannot be written, and NoSpaceError on a full disk; what was
    there is then untouched.
    """
    content = text.encode("utf-8", "replace")
    # A link stays a link, and what is no regular file, /dev/stdout for one, cannot be replaced.
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(path, content)
    except OSError as error:
        raise _unwritable(path, error) from None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_bytes(temporary, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _unwritable(path: Path, error: OSError) -> PgtDiagError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"--output {path}: no space left; what was there is untouched")
    return ConfigurationError(f"--output {path}: {error.strerror or error}")
