"""The errors a user sees: one line each, with the exit code the command line ends with.

Every message names what is wrong, where, and what to do about it. `commands.app` is the only
place that prints them.
"""

import errno
from pathlib import Path


class PgtDiagError(Exception):
    """Base of every error that is somebody's mistake or bad luck, not a defect of pgt-diag."""

    exit_code = 1


class ConfigurationError(PgtDiagError, ValueError):
    """An option, a configuration value or an argument that cannot be used (exit code 2)."""

    exit_code = 2


class DataError(PgtDiagError):
    """A data set that is missing, empty or unreadable (exit code 3)."""

    exit_code = 3


class RunDirectoryError(PgtDiagError):
    """A run directory that is missing, taken, damaged or from another version (exit code 3)."""

    exit_code = 3


class RecorderError(PgtDiagError, RuntimeError):
    """A training loop that the recorder cannot follow (exit code 1)."""


class DivergedError(PgtDiagError):
    """The loss became NaN or infinite (exit code 1)."""


class PeerError(PgtDiagError):
    """Another process that trains the same model ended; that one says why.

    Without a message there is nothing to print.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NoSpaceError(RunDirectoryError):
    """A full disk; what was recorded is intact (exit code 4)."""

    exit_code = 4


def storage_error(path: Path, error: OSError) -> RunDirectoryError:
    """Return the error that tells why `path` could not be written."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceError(f"{path}: no space left ({reason}); what was recorded before is intact")
    return RunDirectoryError(f"{path}: cannot be written: {reason}")
