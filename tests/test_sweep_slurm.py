"""The job array as bash runs it: a row per task, a checkpoint and the queue again at its end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from commands.app import main
from pgt_diag.sweep.grid import Row, SweepPreset, build_grid
from pgt_diag.sweep.making import make_rows
from pgt_diag.sweep.status import State, status_of
from tests.runs import contents, difference
from tests.sweeps import DIVERGING, ROOT, TINY, files, options


def write(folder: Path, values: dict[str, Any], capsys: Any, *extra: str) -> dict[str, Any]:
    grid = folder.parent / "empty.toml"
    grid.touch()
    command = ["sweep", f"--config={grid}", f"--sweep-dir={folder}", "--engine=slurm", "--json"]
    assert main([*command, *options({**TINY, **values}), *extra]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a task: `pgt-diag` installed, and a `scontrol` that notes its calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = shlex.quote(sys.executable)
    for name, body in {
        "pgt-diag": f'exec {python} -m pgt_diag "$@"',
        "scontrol": f'echo "$@" >> {shlex.quote(str(tmp_path / "requeued"))}',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_ARRAY_JOB_ID": "77",
    }


def task(script: str, number: int, cluster: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", script],
        cwd=cwd,
        env={**cluster, "SLURM_ARRAY_TASK_ID": str(number)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_task_makes_its_row_as_this_process_would(
    tmp_path: Path, cluster: dict[str, str], capsys: Any
) -> None:
    folder = tmp_path / "a sweep's runs"
    values = {"method": ["baseline", "agc+pgt"]}
    written = write(folder, values, capsys, "--cpus-per-run=2", "--gpus-per-run=1")
    assert written["rows"] == 2
    script = Path(written["scripts"][0]).read_text()
    lines = script.splitlines()
    wanted = "array=1-2", "requeue", "signal=B:USR1@60", "cpus-per-task=2", "gpus-per-node=1"
    assert {f"#SBATCH --{option}" for option in wanted} <= set(lines)
    rows = build_grid(None, {**TINY, **values}).rows
    process = task(written["scripts"][0], 2, cluster, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [status_of(row, folder).state for row in rows] == [State.NEW, State.FINISHED]
    make_rows(rows, tmp_path / "here")
    name = rows[1].name
    assert difference(contents(folder / name), contents(tmp_path / "here" / name)) is None

    before = files(folder / name)
    process = task(written["scripts"][0], 2, cluster, tmp_path)
    assert process.communicate(timeout=120)[0].startswith("already finished")
    assert files(folder / name) == before

    again = write(folder, values, capsys)
    assert again["rows"] == 1, "what is finished is not submitted again"
    process = task(written["scripts"][0], 2, cluster, tmp_path)
    assert " has no row 2" in process.communicate(timeout=120)[1]
    assert process.returncode == 2


def test_a_minute_before_its_end_a_task_writes_a_checkpoint_and_is_queued_again(
    tmp_path: Path, cluster: dict[str, str], capsys: Any
) -> None:
    folder = tmp_path / "runs"
    values = {"epochs": 6}
    script = write(folder, values, capsys)["scripts"][0]
    (row,) = build_grid(None, {**TINY, **values}).rows
    process = task(script, 1, cluster, tmp_path)
    _wait_for_iterations(row, folder, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert (tmp_path / "requeued").read_text() == "requeue 77_1\n"
    assert status_of(row, folder).state is State.INTERRUPTED
    process = task(script, 1, cluster, tmp_path)
    assert process.wait(timeout=120) == 0
    make_rows([row], tmp_path / "here")
    there = contents(tmp_path / "here" / row.name)
    assert difference(contents(folder / row.name), there) is None


def test_a_task_of_several_processes(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path, {}, capsys, "--nproc=4", "--gpus-per-run=4")
    [line] = next(tmp_path.glob("rows-*.txt")).read_text().splitlines()
    assert " --nproc 4 " in line


@pytest.mark.parametrize(
    ("sent", "code", "requeued"),
    [
        (signal.SIGUSR1, 130, True),
        (signal.SIGUSR1, 0, False),
        (
            signal.SIGTERM,
            130,
            False,
        ),  # a preemption, which Slurm queues itself, or a user's scancel
    ],
)
def test_only_what_its_time_limit_stopped_is_queued_again(
    tmp_path: Path, cluster: dict[str, str], capsys: Any, sent: int, code: int, requeued: bool
) -> None:
    script = write(tmp_path / "runs", {}, capsys)["scripts"][0]
    # In the place of a run: it says when it listens, and ends with this code when told to.
    stays = f"trap 'exit {code}' USR1 TERM; touch listens; while :; do sleep 0.01; done"
    (tmp_path / "runs" / "setup.sh").write_text(f"eval() {{ {stays}; }}")
    process = task(script, 1, cluster, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "listens").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    assert process.wait(timeout=60) == code
    assert (tmp_path / "requeued").exists() == requeued


def test_more_rows_than_slurm_takes_as_one_array_are_several(tmp_path: Path, capsys: Any) -> None:
    command = ["sweep", "--preset=table2-smoke", "--seeds=102", f"--sweep-dir={tmp_path}"]
    (tmp_path / "sweep-3.sbatch").write_text("of an earlier, larger sweep")
    assert main([*command, "--engine=slurm"]) == 0
    assert not (tmp_path / "sweep-3.sbatch").exists()
    told = capsys.readouterr().out
    first, second = (tmp_path / name for name in ("sweep.sbatch", "sweep-2.sbatch"))
    assert f"--time=24:00:00 {first} && sbatch --time=24:00:00 {second}" in told
    rows: list[str] = []
    for script, count in ((first, 1000), (second, 20)):
        text = script.read_text()
        assert f"#SBATCH --array=1-{count}\n" in text
        found = re.search(r"rows-\w+\.txt", text)
        assert found is not None
        rows += (tmp_path / found[0]).read_text().splitlines()
    wanted = build_grid(SweepPreset.TABLE2_SMOKE, {"seed": list(range(102))}).rows
    assert [shlex.split(row)[-3] for row in rows] == [str(tmp_path / row.name) for row in wanted]


def test_a_waiting_job_array_keeps_its_rows_and_finds_its_data_and_programs(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"dataset": "cifar10", "data": "my images"}
    [script] = write(tmp_path / "runs", {**data, "seed": [0, 1]}, capsys)["scripts"]
    first = Path(script).read_text()
    write(tmp_path / "runs", {**data, "seed": [1]}, capsys)
    name = re.search(r"rows-\w+\.txt", first)
    assert name is not None
    lines = (tmp_path / "runs" / name[0]).read_text().splitlines()
    assert len(lines) == 2
    words = shlex.split(lines[0])
    assert words[words.index("--data") + 1] == str(tmp_path / "my images")
    assert f"PATH={Path(sys.executable).parent}:" in first


def test_failed_rows_are_submitted_on_request(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "runs"
    rows = build_grid(None, {**TINY, **DIVERGING}).rows
    make_rows(rows, folder)
    assert write(folder, DIVERGING, capsys) == {
        "sweep_dir": str(folder), "rows": 0, "scripts": []
    }  # fmt: skip
    assert write(folder, DIVERGING, capsys, "--retry-failed")["rows"] == 1
    # Out of the way: `--resume auto` starts it, and after a requeue goes on with it.
    assert status_of(rows[0], folder).state is State.NEW


def _wait_for_iterations(row: Row, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while status_of(row, folder).done < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
