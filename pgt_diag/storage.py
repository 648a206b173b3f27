"""Files that survive a kill at any instant, and reading that trusts nothing.

Everything in a run directory is written by `write`: under a temporary name, put on disk, renamed,
and the rename put on disk. So a file is there whole or not at all. A file whose content never
changes carries the start of its SHA-256 in its name; the others' are in run.json.
"""

import contextlib
import hashlib
import io
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pgt_diag.errors import RunDirectoryError, storage_error

FINGERPRINT_LENGTH = 16
MAX_PART_BYTES = 1 << 32
MAX_CHECKPOINT_BYTES = 1 << 35
_SETTLED_NS = 2_000_000_000
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def fingerprint(data: bytes) -> str:
    """Return the start of the SHA-256 of `data`, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:FINGERPRINT_LENGTH]


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole, or as it was before, after a kill at any instant.

    Raises what `storage_error` returns when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        file = os.open(temporary, flags, 0o644)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise storage_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those it lies in, unless they are there, and put their names on disk."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    try:
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            sync_folder(each.parent)
    except OSError as error:
        raise storage_error(folder, error) from error


def remove(path: Path) -> None:
    """Delete a file that a durable one has replaced."""
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError as error:
        raise storage_error(path, error) from error


def move(path: Path, folder: Path) -> None:
    """Move a file into a folder on the same disk; a file of that name there is replaced."""
    make_folder(folder)
    try:
        os.replace(path, folder / path.name)  # noqa: PTH105
        sync_folder(folder)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


def read(path: Path, limit: int) -> bytes:
    """Return the content of a plain file of at most `limit` bytes.

    Links are not followed and pipes not waited for: a stranger's run directory may hold both.
    Raises RunDirectoryError, naming the file, and FileNotFoundError.
    """
    with opened(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        if size > memory_share():
            raise RunDirectoryError(f"{path}: has {size:,} bytes, more than there is memory for")
        return file.read()


@contextlib.contextmanager
def opened(path: Path, limit: int) -> Iterator[io.BufferedReader]:
    """Open a file as `read` does, for a content that need not be in memory at once."""
    try:
        with os.fdopen(os.open(path, _READ_FLAGS), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise RunDirectoryError(f"{path}: is not a plain file")
            if found.st_size > limit:
                raise RunDirectoryError(
                    f"{path}: has {found.st_size:,} bytes; no more than {limit:,} can be right"
                )
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "is a link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise RunDirectoryError(f"{path}: {reason}") from None


def verify(path: Path, fingerprints: tuple[str, ...]) -> None:
    """Raise RunDirectoryError unless the content has one of these fingerprints.

    Raises FileNotFoundError. A file that did not change since is not read again.
    """
    with opened(path, MAX_PART_BYTES) as file:
        _verify(path, file, fingerprints)


@contextlib.contextmanager
def verified(path: Path, fingerprints: tuple[str, ...]) -> Iterator[io.BufferedReader]:
    """Open a file as `read` does, once it is verified; what is read is what was verified.

    One descriptor is verified and read, whatever its name leads to by then; on leaving,
    RunDirectoryError is raised when its content has changed meanwhile.
    """
    with opened(path, MAX_PART_BYTES) as file:
        _verify(path, file, fingerprints)
        yield file
        _verify(path, file, fingerprints)


def _verify(path: Path, file: io.BufferedReader, fingerprints: tuple[str, ...]) -> None:
    found = os.fstat(file.fileno())
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    # A second change within the clock's tick, or of the mtime, would not show in the identity.
    settled = time.time_ns() - found.st_ctime_ns > _SETTLED_NS
    known = _known.get(identity) if settled else None
    if known is None:
        file.seek(0)
        known = hashlib.file_digest(file, "sha256").hexdigest()[:FINGERPRINT_LENGTH]
        file.seek(0)
        if settled:
            if len(_known) >= _KNOWN_FILES:
                _known.clear()
            _known[identity] = known
    if known not in fingerprints:
        raise damaged(path)


def damaged(path: Path) -> RunDirectoryError:
    """Return the error that tells of a file whose checksum differs."""
    return RunDirectoryError(f"{path}: its content is not what was written (the checksum differs)")


def check_no_link(folder: Path) -> None:
    """Raise RunDirectoryError when a run's folder is a link: what it leads to is not the run's."""
    if folder.is_symlink():
        raise RunDirectoryError(f"{folder}: is a link; a run directory holds none")


def check_no_links(directory: Path) -> None:
    """Raise RunDirectoryError when an entry of a run directory is a link: it may lead outside."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink():
                raise RunDirectoryError(f"{path}: is a link; a run directory holds none")


def memory_share() -> int:
    """Return how many bytes a run's content may take: half of what memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


_known: dict[tuple[int, ...], str] = {}
"""The fingerprints of files that did not change since, by `os.stat`'s identity of their content."""
_KNOWN_FILES = 1 << 16
