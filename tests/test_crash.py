"""After any kill nothing is lost or doubled, and resuming gives the undisturbed run to the bit.

Children of `tests.crash`'s server are killed, cut off from power, or run out of disk. Every
promise is a function that returns what is wrong; the mutants, in which the protocol is broken on
purpose, are given to the same functions, which then have to find something. `pytest -m long` has
every combination.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pytest

import pgt_diag
from pgt_diag import checkpoint, recorder, writer
from tests.crash import LOSSES, MODEL, MUTANTS, ROOT, Attempt, Fault, Outcome, Server
from tests.runs import contents, difference

OPTIONS = [
    "--dataset=synthetic",
    "--synthetic-images=96",  # and 24 to test with: 12 iterations an epoch
    "--image-size=14",
    f"--model={MODEL}",
    "--norm=batch",
    "--method=agc+pgt",
    "--batch-size=8",
    "--epochs=2",
    "--warmup-epochs=0",
    "--lr=0.05",
    "--min-spell=3",
    "--record-every=4",  # windows lie across checkpoints
    "--checkpoint-every=5",
    "--device=cpu",
    "--threads=1",
]
LAST = 24
INTERRUPTED, SAVED = 15, 10
"""The run that most attempts go on with was killed after iteration 15's flush and before its
checkpoint: an epoch's metrics, feature maps, events and rows of the trace lie beyond the newest
one, which is that of iteration 10."""
ALL_OF = ("flush", "merge", "checkpoint", "metrics")
LANES = 2

Item = TypeVar("Item")


class Operation(NamedTuple):
    """A file operation of an attempt: where it can be killed, its kind, and what kind of file."""

    fault: Fault
    kind: str
    file: str


class Lab:
    """Attempts beside one another, and the undisturbed and the interrupted run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers = [Server() for _ in range(LANES)]
        self._free: Queue[Server] = Queue()
        for server in self.servers:
            self._free.put(server)
        self._numbers = itertools.count()
        self._digests: dict[tuple[str, ...], dict[str, str]] = {}
        self.interrupted = self.folder / "interrupted"
        outcome = self.run(
            self.attempt(
                self.interrupted,
                every_step=True,
                moment=("step", INTERRUPTED),
                action=("signal", signal.SIGKILL),
            )
        )
        assert (outcome.code, outcome.saved) == (-signal.SIGKILL, SAVED)
        assert [path.name[11:23] for path in checkpoint.found_in(self.interrupted)] == [
            f"{SAVED:012}",
            f"{SAVED - 5:012}",
        ]

    def new(self) -> Path:
        return self.folder / f"run-{next(self._numbers)}"

    def copy(self, run: Path) -> Path:
        return Path(shutil.copytree(run, self.new()))

    def attempt(self, run: Path, *more: str, **options: Any) -> Attempt:
        arguments = ["train", *OPTIONS, "--resume=auto", *more, "--run-dir", str(run)]
        return Attempt(arguments, str(run), "", "", **options)

    @contextlib.contextmanager
    def server(self) -> Iterator[Server]:
        server = self._free.get()
        try:
            yield server
        finally:
            self._free.put(server)

    def run(self, attempt: Attempt) -> Outcome:
        with self.server() as server:
            return server.run(attempt)

    def undisturbed(self, *more: str) -> dict[str, str]:
        """Return the digest of a run that nothing happened to."""
        if more not in self._digests:
            run = self.new()
            outcome = self.run(self.attempt(run, *more, digest=True))
            assert outcome.code == 0, outcome.output
            self._digests[more] = outcome.result["digest"]
        return self._digests[more]

    def resume(
        self,
        run: Path,
        *more: str,
        least: int = 0,
        saved: int = 0,
        mutants: tuple[str, ...] = (),
    ) -> str | None:
        """Read a run directory, resume it to its end; return the first thing that is wrong.

        least: iterations that have to be there, in the trace or set aside; saved: the iteration
        of the newest checkpoint that was finished.
        """
        wanted = self.undisturbed(*more)
        outcome = self.run(self.attempt(run, *more, survey=True, digest=True, mutants=mutants))
        found = outcome.result.get("survey", {})
        if outcome.code != 0:
            return f"resuming ended with {outcome.code}: {outcome.output[-300:]}"
        if found["problem"] is not None:
            return str(found["problem"])
        if found["kept"] < least:
            return f"{found['kept']} of {least} iterations are there"
        if resumed_from(outcome.output) < saved:
            return f"resumed from {resumed_from(outcome.output)}, and {saved} was saved"
        digest = outcome.result["digest"]
        wrong = [name for name in wanted | digest if wanted.get(name) != digest.get(name)]
        if wrong:
            return f"not the same: {wrong[:5]}"
        shutil.rmtree(run)
        return None

    def killed(
        self,
        start: Path | None,
        *more: str,
        fault: Fault,
        mutants: tuple[str, ...] = (),
        second: float = 0,
    ) -> str | None:
        """Kill an attempt at a file operation, and `resume`; return what is wrong."""
        run = self.copy(start) if start else self.new()
        outcome = self.run(
            self.attempt(
                run, *more, fault=fault, mutants=mutants, every_step=not second, second=second
            )
        )
        if outcome.code != -signal.SIGKILL:
            return f"{fault} was not met ({outcome.code}): {outcome.output[-300:]}"
        problem = self.resume(
            run,
            *more,
            least=max(INTERRUPTED if start else 0, outcome.flushed),
            saved=max(SAVED if start else 0, outcome.saved),
            mutants=mutants,
        )
        return problem and f"{fault}: {problem}"

    def operations(self, start: Path | None) -> list[Operation]:
        """Return every file operation of an attempt that is left alone."""
        run = self.copy(start) if start else self.new()
        log = self.folder / f"{run.name}.log"
        outcome = self.run(self.attempt(run, every_step=True, log=str(log)))
        assert outcome.code == 0, outcome.output
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [
            Operation(Fault(*line[:3]), line[3], re.sub("[0-9a-f]{4,}", "#", line[4]))
            for line in lines
        ]

    def all(self, check: Callable[[Item], str | None], items: Iterable[Item]) -> list[str]:
        """Return what is wrong with any of the items, found on as many lanes as there are."""
        with ThreadPoolExecutor(LANES) as pool:
            return [problem for problem in pool.map(check, items) if problem]


def resumed_from(output: str) -> int:
    """Return the iteration that a run says it goes on from; LAST when it had reached its end."""
    found = re.search(r"going on from iteration ([\d,]+)", output)
    if "already finished" in output:
        return LAST
    return int(found[1].replace(",", "")) if found else 0


def expect_none(problems: list[str]) -> None:
    assert not problems, "\n".join([f"{len(problems)} problems", *problems])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    for server in lab.servers:
        server.close()


@pytest.fixture(scope="module")
def operations(lab: Lab) -> list[Operation]:
    return lab.operations(lab.interrupted)


# Kills at random


def kill_somewhere(lab: Lab, number: int) -> tuple[str | None, Outcome]:
    """Kill one process at a random instant and resume; return what is wrong, and where it was."""
    dice = random.Random(number)
    while True:
        # What goes on with a killed run is killed as well.
        start = lab.interrupted if dice.random() < 0.4 else None
        run = lab.copy(start) if start else lab.new()
        with lab.server() as server:
            pid = server.start(lab.attempt(run, second=0.125))
            wait_somewhere(server, dice)
            os.kill(pid, signal.SIGKILL)
            outcome = server.wait()
        if outcome.code == -signal.SIGKILL:  # it may have ended before
            break
    problem = lab.resume(
        run,
        least=max(INTERRUPTED if start else 0, outcome.flushed),
        saved=max(SAVED if start else 0, outcome.saved),
    )
    return problem and f"kill {number}: {problem}", outcome


def wait_somewhere(server: Server, dice: random.Random) -> None:
    """Wait for an instant: after a random step, or after entering a random section."""
    board = server.board
    name = dice.choice(["step", "step", "step", "open", "flush", "checkpoint", "metrics", "finish"])
    number = dice.randrange(1, {"step": LAST, "flush": 12, "checkpoint": 6}.get(name, 2))
    while (board.get("steps") if name == "step" else board.entries(name)) < number:
        if board.entries("finish"):
            return
        time.sleep(0.0002)
    time.sleep(dice.random() * (0.008 if name == "step" else 0.003))


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.long)])
def test_a_run_killed_at_any_instant_is_resumed_to_the_bit(kills: int, lab: Lab) -> None:
    outcomes: list[Outcome] = []

    def check(number: int) -> str | None:
        problem, outcome = kill_somewhere(lab, number)
        outcomes.append(outcome)
        return problem

    expect_none(lab.all(check, range(kills)))
    # Kills that hit no run at work would prove nothing.
    writing = [each for each in outcomes if each.inside & {"checkpoint", "flush"}]
    starting = [each for each in outcomes if not each.steps]
    spread = Counter(name for each in outcomes for name in each.inside or {"step"})
    print(f"{kills} kills, {len(starting)} before the first step: {dict(spread)}")
    assert len(starting) <= kills / 3
    assert len(writing) >= kills / 10


# Every file operation


def points(operations: list[Operation], *, every: bool) -> list[Fault]:
    """Return the faults of one entry of each section: before, torn, and after each operation.

    What is on disk after an operation is what is there before the next one, so that `after` is
    left to the last of a section. With `every`, each entry is taken that does something else than
    those before it, to other files or in another order; and of what is no flush or checkpoint each
    operation instead of every third.
    """
    chosen: list[Fault] = []
    by_section = itertools.groupby(sorted(operations), lambda operation: operation.fault.section)
    for name, group in by_section:
        entries = [
            list(entry) for _, entry in itertools.groupby(group, lambda each: each.fault.occurrence)
        ]
        different = {tuple((each.kind, each.file) for each in entry): entry for entry in entries}
        # The entry with most operations has nearly all that the others have.
        for entry in different.values() if every else [max(entries, key=len)]:
            faults = []
            for fault, kind, _ in entry:
                faults.append(fault)
                if kind == "write":
                    faults.append(dataclasses.replace(fault, when="torn"))
            faults.append(dataclasses.replace(entry[-1].fault, when="after"))
            chosen += faults if every or name in ALL_OF else faults[::3]
    return chosen


def test_the_operations_that_are_killed_are_all_there_are(
    operations: list[Operation],
) -> None:
    # What the harness does not see, it cannot kill; a file it is not told of ends the child.
    found = Counter(operation.fault.section for operation in operations)
    for name in ("open", "flush", "merge", "checkpoint", "metrics", "maps", "finish"):
        assert found[name] >= 5, found
    kinds = {operation.kind for operation in operations}
    assert kinds >= {"open", "write", "fsync", "replace", "unlink", "rmdir"}


EVERY = [False, pytest.param(True, marks=pytest.mark.long)]


@pytest.mark.parametrize("every", EVERY)
def test_a_kill_at_any_file_operation_costs_nothing(
    every: bool, lab: Lab, operations: list[Operation]
) -> None:
    faults = points(operations, every=every)
    print(f"{len(faults)} kills: {dict(Counter(fault.section for fault in faults))}")
    expect_none(lab.all(lambda fault: lab.killed(lab.interrupted, fault=fault), faults))


@pytest.mark.parametrize("every", EVERY)
def test_a_kill_while_a_run_is_created_costs_nothing(every: bool, lab: Lab) -> None:
    created = [each for each in lab.operations(None) if early(each.fault, every=every)]
    faults = points(created, every=every)
    print(f"{len(faults)} kills: {dict(Counter(fault.section for fault in faults))}")
    expect_none(lab.all(lambda fault: lab.killed(None, fault=fault), faults))


def early(fault: Fault, *, every: bool) -> bool:
    return every or (fault.section in ("open", "step", "checkpoint") and fault.occurrence == 1)


@pytest.mark.parametrize("every", EVERY)
def test_a_power_loss_costs_nothing_that_was_written(
    every: bool, lab: Lab, operations: list[Operation]
) -> None:
    created = [each for each in lab.operations(None) if each.fault.section != "finish"]
    cases = [
        *((lab.interrupted, fault) for fault in points(operations, every=False)),
        *((None, fault) for fault in points(created, every=False)),
    ]
    losses = itertools.cycle(LOSSES)
    lost = [
        (start, dataclasses.replace(fault, loss=loss))
        for start, fault in (cases if every else cases[::3])
        for loss in (LOSSES if every else [next(losses)])
    ]
    print(f"{len(lost)} power losses")
    expect_none(lab.all(lambda case: lab.killed(case[0], fault=case[1]), lost))


# Mutants


def interrupted_run(lab: Lab, mutants: tuple[str, ...]) -> str | None:
    return lab.resume(lab.copy(lab.interrupted), least=INTERRUPTED, saved=SAVED, mutants=mutants)


def stopped_run(lab: Lab, mutants: tuple[str, ...], step: int = 14) -> str | None:
    """Feature maps are due at iteration 14, where this run is stopped."""
    run = lab.new()
    outcome = lab.run(
        lab.attempt(run, moment=("step", step), action=("signal", signal.SIGTERM), mutants=mutants)
    )
    if outcome.code != 130:
        return f"ended with {outcome.code}: {outcome.output[-300:]}"
    return lab.resume(run, least=step, saved=step, mutants=mutants)


def flipped_bit(lab: Lab, mutants: tuple[str, ...]) -> str | None:
    """Damage the newest checkpoint where a weight is; the one before has to be used."""
    run = lab.copy(lab.interrupted)
    newest = checkpoint.found_in(run)[0]
    weight = checkpoint.load(newest)["model"]["8.weight"].numpy().tobytes()
    data = bytearray(newest.read_bytes())
    data[data.index(weight) + 3] ^= 0x40
    newest.write_bytes(data)
    return lab.resume(run, least=INTERRUPTED, saved=SAVED - 5, mutants=mutants)


def faulted(fault: Fault) -> Callable[[Lab, tuple[str, ...]], str | None]:
    return lambda lab, mutants: lab.killed(lab.interrupted, fault=fault, mutants=mutants)


def unsealed(lab: Lab, mutants: tuple[str, ...]) -> str | None:
    """Kill a run in which only checkpoints put the trace on disk, before the one of iteration 10.

    On its clock no time passes, so that what waits for the disk goes on waiting.
    """
    more, fault = "--feature-map-snapshots=1", Fault("checkpoint", 3, 0)
    return lab.killed(None, more, fault=fault, mutants=mutants, second=1e-6)


def unflushed(lab: Lab, mutants: tuple[str, ...], step: int = 23) -> str | None:
    """Kill a run that has no checkpoint after the first; count what it had not flushed.

    On its clock a step takes an eighth of a second.
    """
    more = ("--checkpoint-every=1000", "--feature-map-snapshots=1")
    run, second = lab.new(), 0.125
    waits = recorder._HANDOVER_SECONDS + writer.FLUSH_SECONDS
    assert waits <= 1  # what is promised
    lab.run(
        lab.attempt(
            run, *more, moment=("step", step), action=("signal", signal.SIGKILL),
            second=second, mutants=mutants,
        )
    )  # fmt: skip
    return lab.resume(run, *more, least=step - math.ceil(waits / second) - 1)


# The first checkpoint that the interrupted run goes on to is that of iteration 15. Its operations:
# open, write, fsync, replace, fsync of the folder, unlink of an older one.
BROKEN: dict[str, Callable[[Lab, tuple[str, ...]], str | None]] = {
    "write_in_place": faulted(Fault("metrics", 1, 1, "torn")),
    "content_not_synced": faulted(Fault("checkpoint", 1, 4, "after", "names")),
    "folder_not_synced": faulted(Fault("checkpoint", 2, 0, "before", "removals")),
    "checkpoint_hash_not_checked": flipped_bit,
    "random_state_left_out": interrupted_run,
    "momentum_left_out": interrupted_run,
    "epoch_sums_left_out": interrupted_run,
    "windows_left_out": interrupted_run,
    "spells_left_out": interrupted_run,
    "brief_spells_left_out": interrupted_run,
    "step_count_left_out": interrupted_run,
    "metrics_not_cut": interrupted_run,
    "later_rows_not_set_aside": interrupted_run,
    "epoch_started_over": interrupted_run,
    "maps_due_at_the_checkpoint_left_out": stopped_run,
    "trace_not_sealed_before_checkpoint": unsealed,
    "older_checkpoint_deleted_first": faulted(Fault("checkpoint", 1, 2)),
    "flushed_at_checkpoints_only": unflushed,
}


def test_every_mutant_has_a_test() -> None:
    assert BROKEN.keys() | {"not_locked"} == MUTANTS.keys()


def test_the_protocol_as_it_is_passes_what_the_mutants_fail(lab: Lab) -> None:
    procedures = set(BROKEN.values())
    expect_none(lab.all(lambda procedure: procedure(lab, ()), procedures))


@pytest.mark.parametrize("mutant", BROKEN)
def test_a_broken_protocol_is_noticed(mutant: str, lab: Lab) -> None:
    problem = BROKEN[mutant](lab, (mutant,))
    print(f"{mutant}: {problem}")
    assert problem is not None


# What a kill costs that is never resumed


def test_at_most_a_second_is_not_on_disk_at_a_kill(lab: Lab) -> None:
    expect_none(lab.all(lambda step: unflushed(lab, (), step), range(10, LAST)))


# Signals


REAL = [
    "--dataset=synthetic",
    "--synthetic-images=64",  # 8 iterations an epoch
    "--image-size=32",
    "--model=mnasnet0_5",  # has dropout
    "--method=gc",
    "--batch-size=8",
    "--epochs=5",
    "--warmup-epochs=0",
    "--device=cpu",
    "--threads=1",
]


def pgt(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pgt_diag", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def signalled(folder: Path, number: signal.Signals | None) -> tuple[int, str]:
    """Train in a process as a user starts it; signal it in its second epoch."""
    folder.mkdir()
    process = pgt(folder, "train", *REAL, "--run-dir=a run")
    assert process.stdout is not None
    output = ""
    while "epoch 1:" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    if number is not None:
        process.send_signal(number)
    output += process.communicate()[0]
    return process.returncode, output


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def signals(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[signal.Signals | None, tuple[Path, int, str]]:
    """Return what became of real processes: folder, exit code and output."""
    root = tmp_path_factory.mktemp("signals")
    asked = (None, *SIGNALS)
    with ThreadPoolExecutor(LANES) as pool:
        done = list(pool.map(lambda number: signalled(root / str(number), number), asked))
    return {number: (root / str(number), *end) for number, end in zip(asked, done, strict=True)}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_a_checkpoint_and_prints_the_command_that_resumes(
    number: signal.Signals, signals: dict[signal.Signals | None, tuple[Path, int, str]]
) -> None:
    folder, code, output = signals[number]
    assert code == 130, output
    run = pgt_diag.load_run(folder / "a run")
    newest = checkpoint.found_in(folder / "a run")[0]
    assert run.status == "interrupted"
    assert int(newest.name.split("-")[1]) == run.iteration_count >= 8
    command = re.search(r"go on with: (pgt-diag .*)", output)
    assert command, output
    resumed = pgt(folder, *shlex.split(command[1])[1:])
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert f"going on from iteration {run.iteration_count}" in output
    undisturbed, code, _ = signals[None]
    assert code == 0
    assert difference(contents(folder / "a run"), contents(undisturbed / "a run")) is None


@pytest.mark.parametrize(
    ("moment", "numbers", "saved"),
    [
        (("evaluation", 1), [signal.SIGTERM], 12),
        (("checkpoint", 3), [signal.SIGUSR1], 10),
        (("metrics", 1), [signal.SIGINT], 12),
        (("step", 14), [signal.SIGTERM, signal.SIGTERM], 14),
        # A second Ctrl-C does not wait for a checkpoint.
        (("step", 14), [signal.SIGINT, signal.SIGINT], 10),
        (("checkpoint", 3), [signal.SIGINT, signal.SIGINT], 5),
        (("evaluation", 1), [signal.SIGUSR1, signal.SIGINT], 10),
    ],
)
def test_signals_at_awkward_moments_leave_a_run_that_resumes_to_the_bit(
    moment: tuple[str, int], numbers: list[int], saved: int, lab: Lab
) -> None:
    run = lab.new()
    action = ("signal", list(map(int, numbers)))
    outcome = lab.run(lab.attempt(run, moment=moment, action=action))
    assert outcome.code == 130, outcome.output
    assert "--resume" in outcome.output
    expect_none([problem for problem in [lab.resume(run, saved=saved)] if problem])


# A full disk


@pytest.mark.parametrize("limit", [0, 20_000])
@pytest.mark.parametrize(
    "moment",
    [
        ("open", 1),
        ("step", 3),
        ("checkpoint", 3),
        ("step", 11),
        ("evaluation", 1),
        ("metrics", 1),
        ("maps", 4),
        ("step", 23),
    ],
)
def test_a_full_disk_ends_the_run_with_code_4_and_room_lets_it_go_on(
    moment: tuple[str, int], limit: int, lab: Lab
) -> None:
    run = lab.new()
    outcome = lab.run(lab.attempt(run, moment=moment, action=("limit", limit), every_step=True))
    assert outcome.code == 4, outcome.output
    assert "no space left" in outcome.output
    if outcome.steps:
        assert f"go on with: pgt-diag train --run-dir {run} --resume" in outcome.output
    problem = lab.resume(run, least=outcome.flushed, saved=outcome.saved)
    assert problem is None, problem


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("moment", [("step", 4), ("checkpoint", 3), ("evaluation", 1)])
def test_a_disk_that_fills_up_costs_nothing(
    moment: tuple[str, int], small_disk: Path, lab: Lab
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    outcome = lab.run(lab.attempt(run, moment=moment, action=("fill", str(ballast))))
    assert outcome.code == 4, outcome.output
    assert "no space left" in outcome.output
    ballast.unlink()
    problem = lab.resume(run, least=outcome.flushed, saved=outcome.saved)
    assert problem is None, problem


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from commands.app import main

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    arguments = ["train", "--dataset=synthetic", "--image-size=32", "--model=squeezenet1_1"]
    assert main([*arguments, "--batch-size=16", "--run-dir", str(tmp_path / "run")]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"needs about \d+ MB, and 1 MB are free", line)
    assert not any(tmp_path.iterdir())


# Two writers


def two_writers(lab: Lab, mutants: tuple[str, ...]) -> str | None:
    """Start a second process on a run that is being written; return what is wrong."""
    run = lab.new()
    with lab.server() as first, lab.server() as second:
        held = lab.attempt(
            run, moment=("step", 14), action=("signal", signal.SIGSTOP), digest=True,
            mutants=mutants,
        )  # fmt: skip
        pid = first.start(held)
        while (state := Path(f"/proc/{pid}/stat").read_text().split()[2]) != "T":
            assert state != "Z"
            time.sleep(0.001)
        problems = []
        for option in ("--resume", "--resume=auto", "--force"):
            attempt = Attempt(
                ["train", *OPTIONS, option, "--run-dir", str(run)], str(run), "", "",
                mutants=mutants,
            )  # fmt: skip
            outcome = second.run(attempt)
            lines = outcome.output.splitlines()
            if outcome.code != 3 or len(lines) != 1 or "is being written" not in lines[0]:
                problems.append(f"{option}: {outcome.code}: {outcome.output[-300:]}")
        os.kill(pid, signal.SIGCONT)
        outcome = first.wait()
    if outcome.code != 0 or outcome.result["digest"] != lab.undisturbed():
        problems.append(f"the first: {outcome.code}: {outcome.output[-300:]}")
    return "; ".join(problems) or None


def test_a_second_writer_is_refused_and_the_first_unharmed(lab: Lab) -> None:
    assert two_writers(lab, ()) is None


def test_without_the_lock_a_second_writer_is_noticed(lab: Lab) -> None:
    assert two_writers(lab, ("not_locked",)) is not None
