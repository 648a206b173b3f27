"""A sweep in this process: each run as if it were alone, whatever befalls the others."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import pgt_diag
from commands.app import main
from pgt_diag import training
from pgt_diag.config import RunConfig
from pgt_diag.directory import RunDirectory
from pgt_diag.errors import DataError
from pgt_diag.progress import Listener, Progress
from pgt_diag.sweep.estimate import estimate
from pgt_diag.sweep.grid import Row
from pgt_diag.sweep.making import FAILED_FOLDER, SweepListener, make_row, make_rows
from pgt_diag.sweep.status import RowStatus, State, planned_names, status_of
from tests.runs import contents, difference
from tests.sweeps import (
    DIVERGING,
    ROOT,
    TINY,
    Stop,
    files,
    options,
    rows_of,
    start,
    sweep_command,
    wait_for,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each row gives when a process of `pgt-diag train` makes nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    made: dict[str, dict[str, Any]] = {}

    def result(row: Row) -> dict[str, Any]:
        if row.name not in made:
            directory = folder / row.name
            process = start(*row.command(directory)[1:], cwd=folder)
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            made[row.name] = contents(directory)
        return made[row.name]

    return result


def assert_as_alone(rows: Iterable[Row], folder: Path, alone: Any) -> None:
    for row in rows:
        found = difference(contents(folder / row.name), alone(row))
        assert found is None, f"{row.name}: {found}"


def test_each_run_is_the_one_that_train_makes_alone_to_the_bit(tmp_path: Path, alone: Any) -> None:
    rows = rows_of(method=["baseline", "agc+pgt"])
    # Settings of the whole process, which must not reach the rows that follow.
    first = rows_of(seed=5, epochs=1, batch_size=32, threads=2, deterministic=True)
    threads = torch.get_num_threads()
    results = make_rows([*first, *rows], tmp_path)
    assert [each.state for each in results] == [State.FINISHED] * 3
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert_as_alone(rows, tmp_path, alone)


def test_a_finished_run_is_left_as_it_is_and_a_changed_one_is_another(tmp_path: Path) -> None:
    rows = rows_of(epochs=1)
    make_rows(rows, tmp_path)
    before = files(tmp_path / rows[0].name)
    changed = rows_of(epochs=1, weight_decay=[5e-4, 1e-3])
    results = make_rows(changed, tmp_path)
    assert [each.row.name == rows[0].name for each in results] == [True, False]
    assert files(tmp_path / rows[0].name) == before
    assert [each.state for each in results] == [State.FINISHED] * 2


@pytest.mark.parametrize("looks", [0, 1, 6, 19, 30])
def test_stopped_anywhere_the_same_sweep_completes_it(
    looks: int, tmp_path: Path, alone: Any
) -> None:
    rows = rows_of(method=["baseline", "agc+pgt"])
    with pytest.raises(KeyboardInterrupt):
        make_rows(rows, tmp_path, stop=Stop(looks))
    finished = [row for row in rows if status_of(row, tmp_path).state is State.FINISHED]
    before = {row: files(tmp_path / row.name) for row in finished}
    results = make_rows(rows, tmp_path)
    assert [each.state for each in results] == [State.FINISHED] * 2
    assert {row: files(tmp_path / row.name) for row in finished} == before
    assert_as_alone(rows, tmp_path, alone)


def test_a_failed_run_is_told_the_others_go_on_and_it_is_retried_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = "\n".join(f"{key} = {json.dumps(value)}" for key, value in TINY.items())
    extra = "".join(f"{key} = {value}\n" for key, value in DIVERGING.items())
    Path("grid.toml").write_text(f"{grid}\n[[row]]\n{extra}[[row]]\nepochs = 1\n")
    command = ["sweep", "--config=grid.toml"]
    folder = tmp_path / "sweeps" / "grid"

    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = (line for line in lines if line.startswith("failed: "))
    assert "the loss became NaN or infinite at iteration" in failed
    assert lines[-1].startswith("1 of 2 runs finished, 1 failed; --retry-failed makes them again")
    before = files(folder)

    assert main([*command, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["finished"], result["failed"]) == (1, 1)
    assert [row["state"] for row in result["rows"]] == ["failed", "finished"]
    assert files(folder) == before, "neither the failed nor the finished run was touched"

    assert main([*command, "--retry-failed"]) == 1
    name = result["rows"][0]["name"]
    set_aside = files(folder / FAILED_FOLDER / f"{name}-1")
    assert set_aside == {
        path.removeprefix(f"{name}/"): data
        for path, data in before.items()
        if path.startswith(name)
    }
    assert pgt_diag.load_run(folder / name).status == "diverged"


def test_what_would_befall_every_run_ends_the_sweep(tmp_path: Path) -> None:
    rows = rows_of(dataset="imagefolder", data=str(tmp_path / "nothing"), seed=[0, 1])
    with pytest.raises(DataError, match="nothing"):
        make_rows(rows, tmp_path / "runs")


def test_an_error_of_one_run_alone_leaves_the_others_be(tmp_path: Path) -> None:
    rows = rows_of(model=["squeezenet1_1", "no_such_net"], epochs=1, seed=0)
    results = make_rows(rows[::-1], tmp_path)
    assert [each.state for each in results] == [State.FAILED, State.FINISHED]
    assert "no_such_net" in (results[0].message or "")


def test_a_directory_with_another_configuration_is_not_touched(tmp_path: Path) -> None:
    (row,) = rows_of(epochs=1)
    (other,) = rows_of(epochs=1, seed=3)
    make_rows([other], tmp_path)
    (tmp_path / other.name).rename(tmp_path / row.name)
    before = files(tmp_path / row.name)
    (status,) = make_rows([row], tmp_path)
    assert status.state is State.FAILED
    assert "holds a run of another configuration; move it away" in (status.message or "")
    assert files(tmp_path / row.name) == before


def test_a_run_that_another_process_writes_is_left_to_it(tmp_path: Path) -> None:
    (row,) = rows_of()
    with pytest.raises(KeyboardInterrupt):
        make_rows([row], tmp_path, stop=Stop(6))
    writer = RunDirectory(tmp_path / row.name)
    writer.lock()
    before = files(tmp_path / row.name)
    try:
        for retry in (False, True):
            assert make_row(row, tmp_path, retry_failed=retry).state is State.RUNNING
        assert files(tmp_path / row.name) == before
    finally:
        writer.unlock()
    assert make_row(row, tmp_path).state is State.FINISHED


def test_a_run_with_nothing_intact_left_fails_and_is_retried_from_its_start(
    tmp_path: Path, alone: Any
) -> None:
    (row,) = rows_of()
    with pytest.raises(KeyboardInterrupt):
        make_rows([row], tmp_path, stop=Stop(6))
    for path in (tmp_path / row.name / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    (status,) = make_rows([row], tmp_path)
    assert status.state is State.FAILED
    assert "nothing intact to go on from" in (status.message or "")
    (status,) = make_rows([row], tmp_path, retry_failed=True)
    assert_as_alone([row], tmp_path, alone)


def test_sigkill_at_any_instant_and_the_same_command_again(tmp_path: Path, alone: Any) -> None:
    values = {"seed": [0, 1, 2]}
    rows = rows_of(**values)
    folder = tmp_path / "runs"

    def kill_at(row: Row, iterations: int) -> None:
        process = start(*sweep_command(values), cwd=tmp_path)

        def reached() -> bool:
            status = status_of(row, folder)
            return status.state is not State.NEW and status.done >= iterations

        wait_for(lambda: reached() or process.poll() is not None)
        process.kill()
        process.communicate()

    # Each kill later than the one before: in the first run, between two, in the last.
    for row, iterations in ((rows[0], 9), (rows[1], 0), (rows[2], 5)):
        kill_at(row, iterations)
    finished = [row for row in rows if status_of(row, folder).state is State.FINISHED]
    before = {row: files(folder / row.name) for row in finished}
    process = start(*sweep_command(values), cwd=tmp_path)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "3 of 3 runs finished, 0 failed; next: pgt-diag report runs" in out
    assert {row: files(folder / row.name) for row in finished} == before
    assert_as_alone(rows, folder, alone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_and_names_the_command(
    number: signal.Signals, tmp_path: Path
) -> None:
    values = {"seed": [0, 1], "epochs": 200}
    process = start(*sweep_command(values), cwd=tmp_path)
    row = rows_of(**values)[0]
    wait_for(lambda: status_of(row, tmp_path / "runs").done > 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped; the same command goes on: pgt-diag sweep --config=empty.toml" in errors
    status = status_of(row, tmp_path / "runs")
    assert status.state is State.INTERRUPTED
    assert status.planned is not None
    assert 3 < status.done < status.planned
    assert status_of(rows_of(**values)[1], tmp_path / "runs").state is State.NEW
    assert planned_names(tmp_path / "runs") == [row.name for row in rows_of(**values)]


def test_two_processes_make_each_run_together_and_end_with_the_sweep(tmp_path: Path) -> None:
    [row] = rows_of(seed=3, batch_size=8, epochs=8)
    folder = tmp_path / "runs"
    command = sweep_command({"seed": [3], "batch_size": 4, "epochs": 8})
    command += ["--nproc=2", "--batch-per=process"]
    process = start(*command, cwd=tmp_path)
    wait_for(lambda: status_of(row, folder).done > 2, process)
    process.kill()
    process.communicate()
    wait_for(lambda: status_of(row, folder).state is not State.RUNNING)
    assert status_of(row, folder).state is State.INTERRUPTED
    process = start(*command, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    run = pgt_diag.load_run(folder / row.name)
    assert (run.status, run.info["environment"]["processes"]) == ("finished", 2)
    assert run.info["resumed_from"]


def test_a_run_that_fails_in_several_processes_says_why(tmp_path: Path) -> None:
    (row,) = rows_of(batch_size=8, accumulate=5)
    (status,) = make_rows([row], tmp_path, processes=2)
    assert status.state is State.FAILED
    assert "need at least 10 images" in str(status.message)


def test_data_that_several_processes_cannot_load_end_the_sweep(tmp_path: Path) -> None:
    rows = rows_of(dataset="cifar10", data=str(tmp_path / "nothing"), seed=[0, 1])
    with pytest.raises(DataError, match=r"no intact copy in .*nothing"):
        make_rows(rows, tmp_path / "runs", processes=2)


def test_two_sweeps_at_once_make_each_run_once(tmp_path: Path, alone: Any) -> None:
    values = {"seed": [0, 1, 2, 3]}
    processes = [start(*sweep_command(values), cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    rows = rows_of(**values)
    for row in rows:
        begun = [line for out, _ in outputs for line in out.splitlines() if "starts" in line]
        assert sum(row.name in line for line in begun) == 1
    assert_as_alone(rows, tmp_path / "runs", alone)


def test_dry_run_lists_how_the_rows_stand_and_what_they_need(tmp_path: Path, capsys: Any) -> None:
    values = {"method": "pgt", "alpha": [0.25, 0.5, 0.75]}
    rows = rows_of(**values)
    make_rows(rows[:1], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_rows(rows[:2], tmp_path, stop=Stop(9))
    before = files(tmp_path)
    (tmp_path / "empty.toml").touch()
    command = ["sweep", f"--config={tmp_path / 'empty.toml'}", f"--sweep-dir={tmp_path}"]
    command += [*options({**TINY, **values}), "--dry-run"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in plan["rows"]] == ["finished", "interrupted", "new"]
    assert [row["iterations"] > 0 for row in plan["rows"]] == [True, True, False]
    seconds = [row["estimated_seconds"] for row in plan["rows"]]
    assert (seconds[0], plan["rows"][0]["disk_bytes"]) == (0, 0)
    assert seconds[1] <= seconds[2]
    assert plan["rows"][2]["estimate_source"] == "1 finished of this size"
    expected = training.plan(rows[2].config, tmp_path / "new").disk_bytes
    assert plan["rows"][2]["disk_bytes"] == expected
    assert plan["estimated_seconds"] == pytest.approx(sum(seconds))
    assert main(command) == 0
    out = capsys.readouterr().out
    middle = plan["rows"][1]
    assert f"interrupted at {middle['iterations']} of {middle['planned_iterations']}" in out
    assert "learning rate constant (batch 8: lr 0.01)" in out
    assert f"3 runs in {tmp_path}: 1 new, 1 interrupted, 1 finished" in out
    after = files(tmp_path)
    del after["empty.toml"]
    assert after == before


def test_time_is_measured_where_no_run_has_finished(tmp_path: Path) -> None:
    rows = rows_of(epochs=4, batch_size=[4, 8])
    found = estimate([status_of(row, tmp_path) for row in rows], tmp_path)
    assert all(each.seconds > 0 and each.disk_bytes > 0 for each in found)
    assert found[0].flops == found[1].flops > 0
    assert 0 < found[0].memory_bytes < found[1].memory_bytes
    # Two processes have half of the batch each: that of 8 images is then one of 4.
    shared = estimate([status_of(rows[1], tmp_path)], tmp_path, processes=2)
    assert shared[0].memory_bytes == found[0].memory_bytes
    assert {each.source for each in found} == {"a few iterations measured here"}
    assert not list(tmp_path.iterdir())


def test_a_sweep_whose_data_is_not_named_says_so_at_once(tmp_path: Path, capsys: Any) -> None:
    command = ["sweep", "--preset=table2", "--seeds=1", f"--sweep-dir={tmp_path}", "--dry-run"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pgt-diag: error: dataset is imagefolder;")


def test_the_report_has_table_2_while_the_sweep_runs(tmp_path: Path, capsys: Any) -> None:
    values = {"batch_size": [8, 16], "method": ["baseline", "pgt"], "lr_rule": "linear"}
    rows = rows_of(**values, lr_base_batch=8)
    make_rows(rows[:3], tmp_path / "runs")
    seen: list[str] = []

    class Reporter(SweepListener, Listener):
        def row_listener(self, row: Row) -> Listener:
            return self

        def iterated(self, progress: Progress) -> None:
            if progress.iteration == 7:
                report = ["report", str(tmp_path / "runs"), "--format=csv", "-o", "-"]
                assert main(report) == 0
                seen.append(capsys.readouterr().out)

    make_rows(rows, tmp_path / "runs", listener=Reporter())
    (table,) = seen
    assert "1 running" in table
    assert "lr 0.01 at 8, 0.02 at 16 (linear in the batch size)" in table
    assert main(["show", str(tmp_path / "runs")]) == 0
    assert "linear in the batch size" in capsys.readouterr().out


def test_listeners_hear_of_every_row(tmp_path: Path) -> None:
    heard: list[RowStatus] = []

    class Recorder(SweepListener):
        def changed(self, status: RowStatus) -> None:
            heard.append(status)

    rows = rows_of(epochs=1, seed=[0, 1])
    make_rows(rows, tmp_path, listener=Recorder())
    assert [(each.row, each.state) for each in heard] == [(row, State.FINISHED) for row in rows]
    assert all(each.test_accuracy is not None for each in heard)


def test_help_and_mistyped_options_load_no_torch() -> None:
    code = (
        "import sys\nfrom commands.app import main\n"
        "assert main(['sweep', '--help']) == 0\n"
        "assert main(['sweep', '--preset=table2', '--set=lr=-1']) == 2\n"
        "assert not {'torch', 'pandas', 'pyarrow', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_where_and_how_fast_is_taken_from_the_command_also_when_a_run_goes_on(
    tmp_path: Path,
) -> None:
    (row,) = rows_of(checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        make_rows([row], tmp_path, stop=Stop(6))
    changed = dataclasses.replace(row, config=dataclasses.replace(row.config, checkpoint_every=9))
    assert changed.name == row.name
    make_rows([changed], tmp_path)
    config = pgt_diag.load_run(tmp_path / row.name).config
    assert isinstance(config, RunConfig)
    assert config.checkpoint_every == 9
