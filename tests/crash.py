"""Real training runs, killed at a chosen instant: the harness of test_crash.py.

`python -m tests.crash` is a server. It imports torch and pgt-diag once, computes nothing (a fork
after that could hang), and forks a child for every attempt; the child runs the command line in its
own run directory. What a child does differently from a user's process is asked for, by `Attempt`.
"""

# It is os itself whose functions are replaced in a child.
# ruff: noqa: PTH112, PTH115, PTH116, PTH118, PTH119, PTH120

import atexit
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
MODEL = "crash_test_net"  # registered in the server: see `register_net`
SECTIONS = (
    "open",  # a run directory created, or made to fit a checkpoint
    "flush",
    "merge",
    "checkpoint",
    "metrics",
    "maps",
    "evaluation",
    "seal",
    "finish",
    "step",
)
LOSSES = ("names", "nothing", "removals")
"""What a power loss leaves. Content that was not synced is always torn. Of the changes to a folder
that was not synced since: all of them, none of them, or only what was removed from it."""


@dataclass(frozen=True, order=True)
class Fault:
    """Kill at one file operation: the `ordinal`-th in the `occurrence`-th entry of a section."""

    section: str
    occurrence: int
    ordinal: int
    when: str = "before"
    """before, torn (half of a write), or after."""
    loss: str | None = None
    """One of LOSSES: the power goes, and not just the process."""


@dataclass(frozen=True)
class Attempt:
    """One process: the command line's arguments, and what is done to it."""

    arguments: list[str]
    run: str
    """The run directory, the last of the arguments."""
    board: str
    result: str
    survey: bool = False
    """Read the run directory before, as `survey` does."""
    digest: bool = False
    """Afterwards put the fingerprint of everything a run has in the result."""
    every_step: bool = False
    """Flush after every step, by no clock, and merge parts in fours: each run does the same."""
    fault: Fault | None = None
    moment: tuple[str, int] = ("never", 0)
    """When `action` is taken: a section and its entry, or "step" and how many are done."""
    action: tuple[str, Any] = ("none", None)
    """signal and its number, or several; limit and the largest size of a file in bytes; fill and a
    path."""
    mutants: tuple[str, ...] = ()
    log: str | None = None
    """Where to write down every file operation, as a Fault and what it does, one JSON a line."""
    second: float = 0.0
    """With this, a clock for recorder and writer on which every step takes so long, and the writer
    is waited for."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: code is negative for a signal; the rest is the board's last state."""

    code: int
    output: str
    result: dict[str, Any]
    inside: frozenset[str]
    steps: int
    flushed: int
    saved: int


class Board:
    """Memory shared with a child, which outlives its kill."""

    SIZE = 4096
    _NUMBERS = ("steps", "flushed", "saved")

    def __init__(self, path: str | Path) -> None:
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    @staticmethod
    def new(path: Path) -> "Board":
        path.write_bytes(bytes(Board.SIZE))
        return Board(path)

    def set(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._memory, 512 + 8 * self._NUMBERS.index(name), value)

    def get(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._memory, 512 + 8 * self._NUMBERS.index(name))[0])

    def enter(self, section: str) -> int:
        """Say that a section was entered; return how often it has been."""
        index = SECTIONS.index(section)
        self._memory[index] += 1
        entries = self.entries(section) + 1
        struct.pack_into("<q", self._memory, 1024 + 8 * index, entries)
        return entries

    def leave(self, section: str) -> None:
        self._memory[SECTIONS.index(section)] -= 1

    def entries(self, section: str) -> int:
        offset = 1024 + 8 * SECTIONS.index(section)
        return int(struct.unpack_from("<q", self._memory, offset)[0])

    @property
    def inside(self) -> frozenset[str]:
        return frozenset(name for index, name in enumerate(SECTIONS) if self._memory[index])


# The tests' side


class Server:
    """Runs attempts, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder = Path(tempfile.mkdtemp(prefix="pgt-diag-crash-"))
        self.board: Board

    def start(self, attempt: Attempt) -> int:
        """Start an attempt; return its process id. `board` is its board."""
        board, self._result = self._folder / "board", self._folder / "result"
        self.board = Board.new(board)
        self._result.unlink(missing_ok=True)
        attempt = dataclasses.replace(attempt, board=str(board), result=str(self._result))
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(attempt)) + "\n")
        self._process.stdin.flush()
        return int(self._line()["pid"])

    def wait(self) -> Outcome:
        answer = self._line()
        result = json.loads(self._result.read_text()) if self._result.exists() else {}
        return Outcome(
            answer["code"], answer["output"], result, self.board.inside,
            *(self.board.get(name) for name in ("steps", "flushed", "saved")),
        )  # fmt: skip

    def run(self, attempt: Attempt) -> Outcome:
        self.start(attempt)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server died"
        answer: dict[str, Any] = json.loads(line)
        return answer


# The server's side


def serve() -> None:
    # What is imported late, typer's, rich's and pyarrow's: here, and not in every child.
    import pyarrow.dataset  # noqa: F401
    import pydantic.type_adapter  # noqa: F401
    import rich._emoji_codes  # noqa: F401
    import torch
    import typer._adapters  # noqa: F401

    from commands import app, console  # noqa: F401
    from pgt_diag import resuming, training  # noqa: F401
    from tests import runs  # noqa: F401

    torch.set_num_threads(1)
    register_net()
    for line in sys.stdin:
        values = json.loads(line)
        fault = values.pop("fault")
        attempt = Attempt(**values, fault=Fault(**fault) if fault else None)
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reading)
            for descriptor in (1, 2):
                os.dup2(writing, descriptor)
            os.close(writing)
            _be_child(attempt)
        os.close(writing)
        print(json.dumps({"pid": pid}), flush=True)
        with os.fdopen(reading, encoding="utf-8", errors="replace") as file:
            output = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "output": output}), flush=True)


def register_net() -> None:
    """Make `tiny_net` a model that `--model` names."""
    from torchvision.models import _api

    if tiny_net.__module__ == __name__:
        tiny_net.__module__ = "torchvision.models.crash_test"  # where build_model looks for names
        _api.register_model(name=MODEL)(tiny_net)


def tiny_net(*, num_classes: int = 10, weights: None = None) -> Any:
    """Return a network in which everything a checkpoint holds matters within a few iterations.

    Dropout draws random numbers; the biases make channels that flicker, that die and that are dead.
    """
    import torch
    from torch import nn

    first, second = nn.Conv2d(3, 12, 3, stride=2), nn.Conv2d(12, 16, 3, stride=2)
    with torch.no_grad():
        first.bias.copy_(torch.linspace(-3.0, 0.1, 12))
        second.bias.copy_(torch.linspace(-2.5, 0.1, 16))
        second.bias[0] = -100
    return nn.Sequential(
        first, nn.ReLU(), nn.BatchNorm2d(12), second, nn.ReLU(), nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


def _be_child(attempt: Attempt) -> None:
    code = 99
    try:
        code = _child(attempt)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _child(attempt: Attempt) -> int:
    from commands.app import main

    result: dict[str, Any] = {}
    if attempt.survey:
        result["survey"] = survey(Path(attempt.run))
    instruments = _Instruments(attempt, Board(attempt.board))
    instruments.install()
    for name in attempt.mutants:
        MUTANTS[name]()
    code = main(list(attempt.arguments))
    atexit._run_exitfuncs()
    instruments.uninstall()
    if attempt.digest and code == 0:
        result["digest"] = digest(Path(attempt.run))
    if attempt.survey or attempt.digest:
        Path(attempt.result).write_text(json.dumps(result))
    return code


def digest(path: Path) -> dict[str, str]:
    """Return a fingerprint of each thing in `tests.runs.contents`."""
    import pandas as pd

    from pgt_diag import checkpoint
    from tests.runs import contents

    for older in checkpoint.found_in(path)[1:]:
        older.unlink()  # deleted before the power went, and back again: no harm

    def plain(value: Any) -> bytes:
        if isinstance(value, pd.DataFrame):
            columns = [value.index.to_series(), *(value[name] for name in value.columns)]
            parts = [str(list(value.columns)).encode()]
            for column in columns:
                bits = column.dtype.kind == "f"
                parts.append(column.to_numpy().tobytes() if bits else str(column.tolist()).encode())
            return b"|".join(parts)
        return value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()

    return {
        name: hashlib.sha256(plain(value)).hexdigest() for name, value in contents(path).items()
    }


def survey(path: Path) -> dict[str, Any]:
    """Read everything in a run directory; say how many iterations are there, and what is wrong.

    `kept` counts those from 0 on that are in the trace or were set aside.
    """
    from pgt_diag.errors import RunDirectoryError
    from pgt_diag.run import load_run

    if not (path / "run.json").exists():
        return {"iterations": 0, "kept": 0, "problem": None, "status": None}
    try:
        run = load_run(path)
        numbers = run.iterations.index.tolist()
        problem = None if numbers == list(range(len(numbers))) else f"iterations {numbers}"
        for kind in ("silent", "clipped"):
            if run.state_counts(kind).index.tolist() != numbers:
                problem = f"{kind} is not there for every iteration"
        every = run.info["record_every"]
        wanted = list(range(0, len(numbers), every))
        for layer in run.layers:
            found = run.weight_norms(layer.name, "max").index.tolist()
            # The norms are written first: a kill in between leaves them ahead of the iterations.
            ahead = list(range(0, found[-1] + 1, every)) if found else []
            if found not in (wanted, [*wanted, len(numbers) - 1]) and not (
                found == ahead and len(found) > len(wanted)
            ):
                problem = f"{layer.name}: rows {found} for {len(numbers)} iterations"
        if run.events.duplicated(["kind", "layer_index", "filter", "start_iteration"]).any():
            problem = "an event is there twice"
        if (run.events["start_iteration"] >= len(numbers)).any():
            problem = "an event of an iteration that is not there"
        epochs = run.metrics["epoch"].tolist() if len(run.metrics) else []
        if epochs != list(range(len(epochs))):
            problem = f"epochs {epochs}"
        taken = [each.iteration for each in run.feature_maps]
        if len(taken) != len(set(taken)):
            problem = f"feature maps {taken}"
        _ = run.brief_spells
    except (RunDirectoryError, FileNotFoundError) as error:
        return {"iterations": 0, "kept": 0, "problem": f"not readable: {error}", "status": None}
    rows = set(numbers)
    for part in path.glob("set-aside/resume-*/iterations/part-*"):
        first, last = map(int, part.name.split("-")[1:3])
        rows.update(range(first, last + 1))
    kept = next(number for number in range(len(rows) + 1) if number not in rows)
    return {"iterations": len(numbers), "kept": kept, "problem": problem, "status": run.status}


class _Instruments:
    """What a child carries: the board, faults, moments, and a clock."""

    def __init__(self, attempt: Attempt, board: Board) -> None:
        self.attempt = attempt
        self.board = board
        self.stack = threading.local()
        self.disk = _Disk(attempt, self.where)

    def where(self) -> tuple[str, int]:
        sections: list[tuple[str, int]] = getattr(self.stack, "sections", [])
        return sections[-1] if sections else ("step", 1)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        entry = self.board.enter(name)
        stack = self.stack.__dict__.setdefault("sections", [])
        stack.append((name, entry))
        try:
            self.moment(name, entry)
            yield
        finally:
            stack.pop()
            self.board.leave(name)

    def moment(self, name: str, number: int) -> None:
        if self.attempt.moment != [name, number]:  # a list: it came as JSON
            return
        action, value = self.attempt.action
        if action == "signal":
            for each in value if isinstance(value, list) else [value]:
                os.kill(os.getpid(), each)
        elif action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (value, resource.RLIM_INFINITY))
        elif action == "fill":
            free = shutil.disk_usage(Path(value).parent).free
            with self.disk.off(), Path(value).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, free)

    def install(self) -> None:
        from pgt_diag import recorder, trace, training, writer
        from pgt_diag.directory import RunDirectory
        from pgt_diag.encoder import TraceEncoder
        from pgt_diag.recorder import FilterRecorder

        session = training._Session
        for owner, method, name in (
            (session, "record", "open"),
            (session, "_save_checkpoint", "checkpoint"),
            (session, "_evaluate", "evaluation"),
            (TraceEncoder, "flush", "flush"),
            (TraceEncoder, "seal", "seal"),
            (trace.PartWriter, "_merge", "merge"),
            (RunDirectory, "append_metrics", "metrics"),
            (RunDirectory, "write_feature_maps", "maps"),
            (FilterRecorder, "close", "finish"),
        ):
            self.wrap(owner, method, name)
        board, attempt, step = self.board, self.attempt, session._step
        clock = SimpleNamespace(now=0.0)

        def stepping(self_: Any, *arguments: Any) -> Any:
            clock.now += attempt.second
            sums = step(self_, *arguments)
            steps = self_.recorder.steps
            board.set("steps", steps)
            if attempt.every_step:
                self_.recorder.flush()
            elif attempt.second:
                _settle(self_.recorder._writer)
            self.moment("step", steps)
            return sums

        session._step = stepping  # type: ignore[method-assign]
        if attempt.every_step or attempt.second:
            stopped = SimpleNamespace(**{**vars(time), "monotonic": lambda: clock.now})
            writer.time = recorder.time = stopped  # type: ignore[assignment]
        if attempt.every_step:
            trace._MERGE_AT = 4
        self.disk.install()

    def uninstall(self) -> None:
        self.disk.uninstall()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)
        board = self.board

        def wrapped(self_: Any, *arguments: Any, **options: Any) -> Any:
            with self.section(name):
                result = original(self_, *arguments, **options)
            if name == "flush":
                board.set("flushed", self_.iterations)
            elif name == "checkpoint":
                board.set("saved", self_.recorder.steps)
            return result

        setattr(owner, method, wrapped)


def _settle(writer: Any) -> None:
    """Wait until the writer has done what it was given, and what its clock says."""
    done: SimpleQueue[None] = SimpleQueue()
    writer._tasks.put(writer._flush_if_due)
    writer._tasks.put(lambda: done.put(None))
    done.get()


class _Disk:
    """Stands in for `os` where files are changed: counts, kills, tears, and loses power."""

    def __init__(self, attempt: Attempt, where: Callable[[], tuple[str, int]]) -> None:
        self.where = where
        self.root = os.path.realpath(attempt.run)
        self.fault = attempt.fault
        # A killed process's writes are not lost: where no instant is waited for, syncs are only
        # taken note of, which saves most of the time.
        self.syncing = not (attempt.every_step or attempt.digest)
        self.log = os.open(attempt.log, os.O_WRONLY | os.O_CREAT) if attempt.log else None
        self.real = SimpleNamespace(**{name: getattr(os, name) for name in _CHANGES})
        self.ordinals: dict[tuple[str, int], int] = {}
        self.files: dict[int, str] = {}
        self.unsynced: set[int] = set()  # inodes
        self.changes: list[tuple[str, str, str, str | None]] = []  # kind, folder, path, what was
        self.grave = tempfile.mkdtemp(dir=Path(self.root).parent) if self.losing else ""
        self.buried = 0
        self.local = threading.local()

    @property
    def losing(self) -> bool:
        return self.fault is not None and self.fault.loss is not None

    def install(self) -> None:
        for name in _CHANGES:
            setattr(os, name, getattr(self, name))
        sys.addaudithook(self._audit)

    def uninstall(self) -> None:
        for name in _CHANGES:
            setattr(os, name, getattr(self.real, name))
        self.root = "nowhere"

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        self.local.known = True
        try:
            yield
        finally:
            self.local.known = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Fail for a file that is changed behind the harness's back."""
        if event != "open" or getattr(self.local, "known", False):
            return
        path, _, flags = arguments
        if not isinstance(path, str | bytes | os.PathLike) or not flags & _WRITES:
            return
        if os.path.realpath(os.fsdecode(path)).startswith(f"{self.root}/"):
            os.write(2, f"written behind the harness's back: {path!r}\n".encode())
            os._exit(98)

    def open(self, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        full = self._inside(path, options.get("dir_fd"))
        if full is None or not flags & _WRITES:
            with self.off():
                descriptor: int = self.real.open(path, flags, *arguments, **options)
            if full is not None:
                self.files[descriptor] = full
            return descriptor
        with self._operation("open", full), self.off():
            new = not os.path.lexists(full)
            descriptor = self.real.open(path, flags, *arguments, **options)
            self.files[descriptor] = full
            if new:
                self._changed("create", full)
            elif flags & os.O_TRUNC:
                self.unsynced.add(os.fstat(descriptor).st_ino)
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        full = self.files.get(descriptor)
        if full is None:
            return int(self.real.write(descriptor, data))
        with self._operation("write", full, lambda: self.real.write(descriptor, _half(data))):
            self.unsynced.add(os.fstat(descriptor).st_ino)
            return int(self.real.write(descriptor, data))

    def fsync(self, descriptor: int) -> None:
        full = self.files.get(descriptor)
        if full is None:
            self.real.fsync(descriptor)
            return
        with self._operation("fsync", full):
            if self.syncing:
                self.real.fsync(descriptor)
            found = os.fstat(descriptor)
            self.unsynced.discard(found.st_ino)
            if stat.S_ISDIR(found.st_mode):
                self.changes = [change for change in self.changes if change[1] != full]

    def close(self, descriptor: int) -> None:
        self.files.pop(descriptor, None)
        self.real.close(descriptor)

    def replace(self, source: Any, target: Any, **_: Any) -> None:
        old, new = self._inside(source, None), self._inside(target, None)
        if old is None or new is None:
            self.real.replace(source, target)
            return
        with self._operation("replace", new):
            was = self._bury(new)
            self.real.replace(source, target)
            # A file that changes folders is in one of them, whatever happens.
            moved = os.path.dirname(old) != os.path.dirname(new)
            self._changed("move" if moved else "rename", new, old if moved else was)

    def unlink(self, path: Any, **options: Any) -> None:
        full = self._inside(path, options.get("dir_fd"))
        if full is None or not os.path.lexists(full):
            self.real.unlink(path, **options)
            return
        with self._operation("unlink", full):
            was = self._bury(full)
            self.real.unlink(path, **options)
            self._changed("remove", full, was)

    def mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        full = self._inside(path, options.get("dir_fd"))
        if full in (None, self.root) or os.path.lexists(full):
            self.real.mkdir(path, *arguments, **options)
            return
        with self._operation("mkdir", full):
            self.real.mkdir(path, *arguments, **options)
            self._changed("mkdir", full)

    def rmdir(self, path: Any, **options: Any) -> None:
        full = self._inside(path, options.get("dir_fd"))
        if full is None:
            self.real.rmdir(path, **options)
            return
        with self._operation("rmdir", full):
            self.real.rmdir(path, **options)
            self.changes = [change for change in self.changes if change[1] != full]
            self._changed("rmdir", full)

    def _inside(self, path: Any, folder: int | None) -> str | None:
        """Return the full path of what is in the run directory; None for anything else."""
        if isinstance(path, int):
            return self.files.get(path)
        text = os.fsdecode(path)
        if folder is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        full = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        within = full.startswith(f"{self.root}/") or full == self.root
        return full if within else None

    @contextlib.contextmanager
    def _operation(
        self, kind: str, path: str, half: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        where = self.where()
        ordinal = self.ordinals[where] = self.ordinals.get(where, -1) + 1
        if self.log is not None:
            entry = [*where, ordinal, kind, os.path.relpath(path, self.root)]
            self.real.write(self.log, json.dumps(entry).encode() + b"\n")
        fault = self.fault
        here = fault is not None and (fault.section, fault.occurrence, fault.ordinal) == (
            *where,
            ordinal,
        )
        if here and fault is not None and fault.when != "after":
            if fault.when == "torn":
                half()
                if kind == "write":
                    self.unsynced.add(os.stat(path).st_ino)
            self.die()
        yield
        if here:
            self.die()

    def _bury(self, path: str) -> str | None:
        if not self.losing or not os.path.lexists(path):
            return None
        self.buried += 1
        os.link(path, grave := f"{self.grave}/{self.buried}")
        return grave

    def _changed(self, kind: str, path: str, was: str | None = None) -> None:
        if self.losing:
            self.changes.append((kind, os.path.dirname(path), path, was))

    def die(self) -> None:
        if self.losing:
            self._lose_power()
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # for the kill to arrive

    def _lose_power(self) -> None:
        assert self.fault is not None
        loss = self.fault.loss
        for found in Path(self.root).rglob("*"):
            if found.is_file() and found.stat().st_ino in self.unsynced:
                os.truncate(found, found.stat().st_size // 2)
        undone = () if loss == "names" else reversed(self.changes)
        for kind, _, path, was in undone:
            if kind == "remove" and loss == "nothing" and was and not os.path.lexists(path):
                if os.path.isdir(os.path.dirname(path)):
                    os.link(was, path)
            elif kind in ("create", "rename") and os.path.lexists(path):
                self.real.unlink(path)
                if was:
                    os.link(was, path)
            elif kind == "move" and os.path.lexists(path) and was:
                self.real.replace(path, was)
            elif kind == "mkdir" and os.path.isdir(path):
                self.uninstall()
                shutil.rmtree(path)
        shutil.rmtree(self.grave, ignore_errors=True)


_CHANGES = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir", "rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _half(data: Any) -> Any:
    return memoryview(data)[: len(data) // 2]


# Mutants: the protocol broken on purpose, in a child


MUTANTS: dict[str, Callable[[], None]] = {}


def _mutant(function: Callable[[], None]) -> Callable[[], None]:
    MUTANTS[function.__name__] = function
    return function


def _edit_checkpoint(edit: Callable[[dict[str, Any]], object]) -> None:
    """Take something out of a checkpoint as it is read."""
    from pgt_diag import checkpoint

    load = checkpoint.load

    def edited(path: Path) -> dict[str, Any]:
        state = load(path)
        edit(state)
        return state

    checkpoint.load = edited


@_mutant
def write_in_place() -> None:
    from pgt_diag import storage

    def write(path: Path, data: bytes) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(file, data)
        os.fsync(file)
        os.close(file)
        storage.sync_folder(path.parent)

    storage.write = write


@_mutant
def content_not_synced() -> None:
    from pgt_diag import storage

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)

    storage.os = SimpleNamespace(**{**vars(os), "fsync": fsync})  # type: ignore[assignment]


@_mutant
def folder_not_synced() -> None:
    from pgt_diag import storage

    storage.sync_folder = lambda folder: None


@_mutant
def checkpoint_hash_not_checked() -> None:
    import torch

    from pgt_diag import checkpoint

    checkpoint.load = lambda path: torch.load(path, weights_only=True)


@_mutant
def random_state_left_out() -> None:
    import torch

    _edit_checkpoint(lambda state: state["random"][0].update(cpu=torch.get_rng_state()))


@_mutant
def momentum_left_out() -> None:
    _edit_checkpoint(lambda state: state["optimizer"].update(state={}))


@_mutant
def epoch_sums_left_out() -> None:
    _edit_checkpoint(lambda state: state["position"]["sums"].zero_())


@_mutant
def windows_left_out() -> None:
    _edit_checkpoint(lambda state: state["recorder"]["encoder"].update(windows={}))


@_mutant
def spells_left_out() -> None:
    def edit(state: dict[str, Any]) -> None:
        spells = state["recorder"]["encoder"]["spells"]
        spells["since"].fill_(-1)
        spells["reported"].zero_()

    _edit_checkpoint(edit)


@_mutant
def brief_spells_left_out() -> None:
    _edit_checkpoint(lambda state: state["recorder"]["encoder"]["spells"]["brief"].zero_())


@_mutant
def step_count_left_out() -> None:
    _edit_checkpoint(lambda state: state["recorder"].update(steps=0))


@_mutant
def trace_not_sealed_before_checkpoint() -> None:
    from pgt_diag.recorder import FilterRecorder

    state_dict = FilterRecorder.state_dict

    def unsealed(self: FilterRecorder) -> dict[str, Any]:
        from unittest.mock import patch

        with patch.object(self._writer.encoder, "flush", lambda: None):
            return state_dict(self)

    def first(self: FilterRecorder) -> dict[str, Any]:
        return state_dict(self) if self._writer is None else unsealed(self)

    FilterRecorder.state_dict = first  # type: ignore[method-assign]


@_mutant
def flushed_at_checkpoints_only() -> None:
    from pgt_diag.writer import WriterThread

    WriterThread.__init__.__defaults__ = (1e6,)  # type: ignore[misc]


@_mutant
def older_checkpoint_deleted_first() -> None:
    from pgt_diag import checkpoint, storage

    save = checkpoint.save

    def deleting(directory: Path, *arguments: Any, **options: Any) -> Path:
        for path in checkpoint.found_in(directory):
            storage.remove(path)
        return save(directory, *arguments, **options)

    checkpoint.save = deleting


@_mutant
def metrics_not_cut() -> None:
    from pgt_diag.directory import RunDirectory

    restore = RunDirectory.restore

    def uncut(self: RunDirectory, state: dict[str, Any], *arguments: Any) -> None:
        restore(self, {**state, "metrics": (self.path / "metrics.csv").read_text()}, *arguments)

    RunDirectory.restore = uncut  # type: ignore[method-assign]


@_mutant
def later_rows_not_set_aside() -> None:
    from pgt_diag import trace

    trace.rewind = lambda *_: None


@_mutant
def epoch_started_over() -> None:
    from pgt_diag import training

    load_data = training.load_data

    def from_the_start(*arguments: Any, **options: Any) -> Any:
        data = load_data(*arguments, **options)
        batches = data.raw_batches
        data.raw_batches = lambda epoch, _: batches(epoch, 0)  # type: ignore[method-assign]
        return data

    training.load_data = from_the_start


@_mutant
def maps_due_at_the_checkpoint_left_out() -> None:
    from pgt_diag import training

    due = training._Session._snapshot_iterations

    def later(self: Any) -> list[int]:
        first = self.recorder.steps
        return [step for step in due(self) if first == 0 or step > first]

    training._Session._snapshot_iterations = later  # type: ignore[method-assign]


@_mutant
def not_locked() -> None:
    from pgt_diag import resuming
    from pgt_diag.directory import RunDirectory

    def lock(self: RunDirectory) -> None:
        self._lock = os.open("/dev/null", os.O_RDONLY)

    RunDirectory.lock = lock  # type: ignore[method-assign]
    resuming.is_locked = lambda _: False


if __name__ == "__main__":
    serve()
