"""Runs to damage, damage, and the command line run on what is left of them."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from commands.app import main
from pgt_diag.config import compose
from pgt_diag.directory import open_info, seal_info
from pgt_diag.resuming import resume_point
from pgt_diag.storage import fingerprint
from pgt_diag.training import train
from tests.crash import MODEL, register_net

register_net()

EXIT_CODES = (0, 1, 2, 3, 4)
OPTIONS = {
    "dataset": "synthetic",
    "model": MODEL,
    "norm": "batch",
    "image_size": 14,
    "batch_size": 16,
    "synthetic_images": 64,
    "epochs": 2,
    "checkpoint_every": 3,
    "threads": 1,
    "device": "cpu",
}
"""Eight iterations, some seconds."""


class StopAt:
    """Asks for a stop after so many iterations, and calls `then` before."""

    def __init__(self, iterations: int, then: Callable[[], object] = lambda: None) -> None:
        self._left, self._then = iterations, then

    def __call__(self) -> bool:
        self._left -= 1
        if self._left == 0:
            self._then()
        return self._left <= 0


def finished_run(path: Path) -> Path:
    """Train to the end."""
    return train(compose(None, {}, OPTIONS)[0], path, command=["pgt-diag", "train"])


def interrupted_run(path: Path) -> Path:
    """Train until iteration 5, be killed, go on from iteration 3, and be stopped at 7."""
    first = path.with_name("first")
    killed = StopAt(5, lambda: shutil.copytree(first, path))
    with contextlib.suppress(KeyboardInterrupt):
        train(compose(None, {}, OPTIONS)[0], first, stop=killed)
    shutil.rmtree(first)
    point = resume_point(path)
    with contextlib.suppress(KeyboardInterrupt):
        train(point.config, path, resume=point, stop=StopAt(4))
    return path


def files_of(path: Path) -> list[Path]:
    """Return every file that has content."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def flip(data: bytes, bit: int) -> bytes:
    """Return the data with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@contextlib.contextmanager
def replaced(contents: dict[Path, bytes]) -> Any:
    """Put other content in files, and the old one back."""
    before = {file: file.read_bytes() for file in contents}
    try:
        for file, data in contents.items():
            file.write_bytes(data)
        yield
    finally:
        for file, data in before.items():
            file.write_bytes(data)


def reseal(path: Path, **values: Any) -> None:
    """Change run.json's entries; its checksum holds afterwards."""
    file = path / "run.json"
    file.write_bytes(seal_info(open_info(file.read_bytes()) | values))


def vouch(path: Path, name: str, data: bytes) -> None:
    """Write a file that run.json has the fingerprint of."""
    (path / name).write_bytes(data)
    info = open_info((path / "run.json").read_bytes())
    reseal(path, digests={**(info.get("digests") or {}), name: [fingerprint(data)]})


def rename_to_content(file: Path, data: bytes) -> Path:
    """Write a file whose name has its fingerprint."""
    file.unlink()
    stem = file.name.rpartition("-")[0]
    new = file.with_name(f"{stem}-{fingerprint(data)}{file.suffix}")
    new.write_bytes(data)
    return new


def outcome(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line in this process; return code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


COMMANDS: dict[str, Callable[[Path], list[str | Path]]] = {
    "show": lambda run: ["show", run],
    "show --json": lambda run: ["show", run, "--json"],
    "report": lambda run: ["report", run, "-o", run.parent / "page.html"],
    "check": lambda run: ["check", run],
    "watch": lambda run: ["watch", run, "--once"],
    "dry run": lambda run: ["train", "--run-dir", run, "--resume", "--dry-run"],
    "resume": lambda run: ["train", "--run-dir", run, "--resume"],
}


def read_by(path: Path, commands: Iterable[str] = COMMANDS) -> dict[str, tuple[int, str]]:
    """Let commands read a run; return each one's code and error.

    AssertionError when one ends otherwise than with its code, and one line if there is an error.
    """
    results = {}
    for name in commands:
        code, out, err = outcome(*COMMANDS[name](path))
        assert code in EXIT_CODES, (name, code, err)
        lines = err.splitlines()
        assert len(lines) <= 1, (name, err)
        assert all(line.startswith("pgt-diag: error: ") for line in lines), (name, err)
        assert (code in (0, 1)) or lines, (name, code, out)
        if name == "show --json" and code == 0:
            json.loads(out)
        results[name] = (code, err)
    return results


def copy_of(run: Path, target: Path) -> Path:
    """Copy a run, links as links; the big checkpoints are shared with the original."""

    def link(source: str, destination: str) -> str:
        if source.endswith(".pt"):
            os.link(source, destination)
            return destination
        return str(shutil.copy2(source, destination))

    return Path(shutil.copytree(run, target, symlinks=True, copy_function=link))
