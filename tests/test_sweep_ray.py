"""A sweep on a real Ray of this machine: killed workers and drivers cost no finished run."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commands.app import main
from pgt_diag.directory import LOCK_FILE
from pgt_diag.errors import ConfigurationError
from pgt_diag.sweep.grid import Row, build_grid
from pgt_diag.sweep.making import SweepListener, make_rows
from pgt_diag.sweep.ray_engine import _collect, _resources
from pgt_diag.sweep.status import State, status_of
from tests.runs import contents, difference
from tests.sweeps import TINY, files, rows_of, start, sweep_command

pytest.importorskip("ray")

SECONDS = 600
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own, which it leaves behind when its driver is killed with -9; they run no tasks."""
VALUES = {"seed": [0, 1, 2], "epochs": 6}


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's own folder; nothing that was started from it may outlive the test."""
    # Ray's sockets lie in it, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    left = _left(folder)
    for process in left:
        os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left, "Ray's processes were left behind"


def _left(folder: Path, but: tuple[str, ...] = ()) -> dict[int, str]:
    """Return the processes that are there after a while, but for those of these names."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        left = {key: name for key, name in _processes(folder).items() if name not in but}
        if not left:
            break
        time.sleep(0.2)
    return left


def _processes(folder: Path) -> dict[int, str]:
    """Return the processes that were started with this folder for Ray, with their names."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            name = (process / "cmdline").read_text().split("\0")[0].strip()
            running = "Z" not in (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"RAY_TMPDIR={folder}".encode() in environment and running:
            found[int(process.name)] = name
    found.pop(os.getpid(), None)
    return found


def _writers(directory: Path) -> list[int]:
    """Return the processes that have a run's lock open."""
    lock = str(directory.resolve() / LOCK_FILE)
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) == lock:
                found.append(int(link.parts[2]))
        except OSError:
            continue
    return [process for process in found if process != os.getpid()]


def _until(what: Any, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_killed_workers_and_drivers_leave_a_sweep_that_the_same_command_completes(
    tmp_path: Path, ray_folder: Path
) -> None:
    rows = build_grid(None, {**TINY, **VALUES}).rows
    command = [*sweep_command(VALUES), "--engine=ray"]
    folder = tmp_path / "runs"

    def reached(row: Row, iterations: int) -> bool:
        return status_of(row, folder).done >= iterations

    def finished() -> list[Row]:
        return [row for row in rows if status_of(row, folder).state is State.FINISHED]

    driver = start(*command, cwd=tmp_path)
    _until(lambda: any(reached(row, 3) for row in rows), driver)
    victim = next(row for row in rows if reached(row, 3))
    (worker,) = _writers(folder / victim.name)
    os.kill(worker, signal.SIGKILL)
    # Its task is tried again, in another process, and goes on from the checkpoint.
    _until(finished, driver)
    driver.kill()
    driver.communicate()
    assert not _left(ray_folder, but=AGENTS), "the workers go with their driver"
    for process, name in _processes(ray_folder).items():
        assert name in AGENTS
        os.kill(process, signal.SIGKILL)
    done = finished()
    assert done
    assert len(done) < len(rows), "the kill came too late to prove anything"
    before = {row: files(folder / row.name) for row in done}

    driver = start(*command, cwd=tmp_path)
    out, errors = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, errors
    assert "3 of 3 runs finished, 0 failed" in out
    assert {row: files(folder / row.name) for row in done} == before
    make_rows(rows, tmp_path / "here")
    for row in rows:
        here = contents(tmp_path / "here" / row.name)
        assert difference(contents(folder / row.name), here) is None


def test_ctrl_c_stops_every_worker_with_a_checkpoint(tmp_path: Path, ray_folder: Path) -> None:
    values = {"seed": [0, 1], "epochs": 300, "checkpoint_every": 100_000}
    rows = build_grid(None, {**TINY, **values}).rows
    folder = tmp_path / "runs"
    driver = start(*sweep_command(values), "--engine=ray", cwd=tmp_path)
    # Half an epoch's rows on disk, so that both really train.
    _until(lambda: all(status_of(row, folder).state is State.RUNNING for row in rows), driver)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 130, errors
    assert "stopped; the same command goes on: pgt-diag sweep" in errors
    for row in rows:
        status = status_of(row, folder)
        assert status.state is State.INTERRUPTED
        assert status.done > 0
        newest = max((folder / row.name / "checkpoints").iterdir())
        assert int(newest.name.split("-")[1]) == status.done
    assert not list(folder.glob(".stop-*"))


def test_ctrl_c_does_not_wait_for_tasks_that_wait_for_their_turn(tmp_path: Path) -> None:
    (row,) = rows_of(seed=0)
    ray = SimpleNamespace(wait=lambda references, **_: ([], references))
    asked = tmp_path / "stop"
    with pytest.raises(KeyboardInterrupt):
        _collect(ray, {"task": row}, tmp_path, {}, SweepListener(), lambda: True, asked)
    assert asked.exists()


def test_a_run_fits_one_machine_of_the_cluster() -> None:
    (row,) = rows_of(seed=0, device="auto", workers=8)
    small, large = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}
    assert _resources(row, [small, small], 1, None, None) == (4, 0)
    assert _resources(row, [small, large], 2, None, None) == (8, 2)
    assert _resources(row, [small, large], 1, 0.5, 0.25) == (0.5, 0.25)
    assert _resources(row, [large, {"CPU": 64.0}], 1, None, None) == (8, 1)
    with pytest.raises(ConfigurationError, match="cpus-per-run is 8, and no machine of Ray's has"):
        _resources(row, [small] * 9, 1, 8, None)
    with pytest.raises(ConfigurationError, match=r"gpus-per-run is 4, and no machine .* 2 GPUs"):
        _resources(row, [small, large, large], 4, None, None)
    with pytest.raises(ConfigurationError, match="no machine of Ray's that has the GPUs"):
        _resources(row, [{"CPU": 64.0}, large], 1, 9, 1)


def test_an_address_where_nothing_answers_is_told_at_once(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.toml").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = ["sweep", f"--config={tmp_path / 'empty.toml'}", f"--sweep-dir={tmp_path / 'runs'}"]
    assert main([*command, "--engine=ray", f"--ray-address={address}"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"pgt-diag: error: ray-address is {address}, and nothing answers there")


def test_what_ray_cannot_give_is_told_at_once(tmp_path: Path, ray_folder: Path) -> None:
    driver = start(*sweep_command({}), "--engine=ray", "--gpus-per-run=64", cwd=tmp_path)
    _, errors = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith("pgt-diag: error: gpus-per-run is 64, and no machine of Ray's has ")
