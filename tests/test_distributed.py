"""Several processes train one model: as one process would, and whatever happens to them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands.app import main
from commands.train import _worker_arguments
from pgt_diag import checkpoint, training
from pgt_diag.config import RunConfig
from pgt_diag.data import load_data
from pgt_diag.distributed import Shard
from pgt_diag.errors import ConfigurationError
from pgt_diag.rendezvous import unused_part
from pgt_diag.run import load_run
from tests import ranks
from tests.ranks import VALUES
from tests.runs import contents, difference
from tests.sweeps import ROOT, TINY

CASES: dict[str, dict[str, Any]] = {
    "baseline": {"values": {"label_smoothing": 0.1}},
    "pgt": {"values": {"method": "pgt"}},
    "gc": {"values": {"method": "gc"}},
    "gc+pgt": {"values": {"method": "gc+pgt", "clip_norm": 0.5}},
    "agc+pgt": {"values": {"method": "agc+pgt", "batch_size": 25, "accumulate": 3}},
}
THREE = (Shard(), *(Shard(rank, 3) for rank in range(3)))
PARTIAL: dict[str, Any] = {"method": "agc", "checkpoint_every": 40}
FOLDER: dict[str, Any] = {
    "dataset": "imagefolder",
    "image_size": 8,
    "augment": "none",
    "bad_images": "skip",
    "workers": 0,
    "batch_size": 6,
    "epochs": 1,
}
OPTIONS = [
    f"--{key.replace('_', '-')}={value}"
    for key, value in {**TINY, "epochs": 4, "batch_size": 9}.items()
]


def torchrun(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pgt_diag", "train", *OPTIONS, "--run-dir=run", *arguments]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("--nproc=2", *arguments),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    process = start(*arguments, cwd=cwd)
    out, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode, out + errors


def wait_for(condition: Any, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def recorded(path: Path) -> bool:
    """Whether some iterations of a run are on disk."""
    return any((path / "iterations").glob("part-*"))


def newest_checkpoint(path: Path) -> int:
    """Return the iteration of a run's newest checkpoint; 0 where there is none."""
    names = [each.name for each in (path / "checkpoints").glob("checkpoint-*.pt")]
    return max((int(name.split("-")[1]) for name in names), default=0)


def children(process: int, but: Sequence[int] = ()) -> list[int]:
    """Return the training processes that a process has started, but for some, by rank."""
    listing = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    found = [each for each in map(int, listing) if each not in but]
    return [each for each in found if b"pgt_diag" in command_line(each)]


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""  # it has just ended


def kill_after_a_checkpoint(
    launcher: subprocess.Popen[str], rank: int, path: Path, earlier: Sequence[int]
) -> list[int]:
    """Kill one of two processes when they have written a checkpoint of the run; return both."""
    wait_for(lambda: len(children(launcher.pid, earlier)) == 2, launcher)
    started = children(launcher.pid, earlier)
    reached = newest_checkpoint(path)
    wait_for(lambda: newest_checkpoint(path) > reached, launcher)
    os.kill(started[rank], signal.SIGKILL)
    return started


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise; two of its files are no images."""
    root = tmp_path_factory.mktemp("images")
    for split, number in (("train", 18), ("val", 4)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                noise = np.random.default_rng(index).integers(256, size=(9, 9, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{index}.png")
    for name in ("a/7.png", "b/3.png"):
        (root / "train" / name).write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Runs that two processes made; "from one" was begun by this one, and "from two" by two."""
    folder = tmp_path_factory.mktemp("shared")
    ranks.train(folder / "from one", PARTIAL, stop_at=100)
    cases = {
        **CASES,
        "batch norm": {"values": {"norm": "batch", "epochs": 1}},
        "folder": {"values": {**FOLDER, "data": str(images)}},
        "from one": {"values": PARTIAL},
        "from two": {"values": PARTIAL, "stop_at": 100},
    }
    script = [ROOT / "tests" / "ranks.py", folder, json.dumps(cases)]
    process = torchrun("--standalone", "--nproc-per-node=2", *script, cwd=folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert load_run(folder / "from two").status == "interrupted"
    assert load_run(folder / "from two").iteration_count > 0
    ranks.train(folder / "from two", PARTIAL)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes record that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, told = run(cwd=folder)
    assert code == 0, told
    return contents(folder / "run")


def weights(path: Path) -> dict[str, torch.Tensor]:
    [newest] = checkpoint.found_in(path)
    state = checkpoint.load(newest)
    return {**state["model"], **dict(momenta(state))}


def momenta(state: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    buffers = state["optimizer"]["state"].items()
    return [(f"momentum {index}", each["momentum_buffer"]) for index, each in buffers]


@pytest.mark.parametrize("name", [*CASES, "from one", "from two"])
def test_two_processes_train_and_record_what_one_does(
    shared: Path, tmp_path: Path, name: str
) -> None:
    values = CASES[name]["values"] if name in CASES else PARTIAL
    ranks.train(tmp_path / "one", values)
    one, two = load_run(tmp_path / "one"), load_run(shared / name)
    assert one.iteration_count == two.iteration_count > 200
    ours = weights(shared / name)
    for key, tensor in weights(tmp_path / "one").items():
        assert (ours[key] - tensor).abs().max() <= 1e-12, key
    assert one.metrics["train_accuracy"].equals(two.metrics["train_accuracy"])
    assert one.metrics["test_accuracy"].equals(two.metrics["test_accuracy"])
    # The test loss is computed in float32.
    for column, rtol in (("train_loss", 1e-12), ("test_loss", 1e-6)):
        np.testing.assert_allclose(two.metrics[column], one.metrics[column], rtol=rtol)
    assert one.events.equals(two.events)
    assert len(one.events) > 0
    for column in one.iterations:
        np.testing.assert_allclose(two.iterations[column], one.iterations[column], rtol=1e-5)
    np.testing.assert_allclose(two.gap_norms(), one.gap_norms(), rtol=1e-5)
    for layer in one.layers:
        for read in ("weight_norms", "gradient_norms", "clip_factors"):
            theirs = getattr(one, read)(layer.name)
            np.testing.assert_allclose(
                getattr(two, read)(layer.name), theirs, rtol=1e-6, atol=1e-12
            )


def test_a_resumed_run_names_every_number_of_processes(shared: Path) -> None:
    assert load_run(shared / "pgt").info["environment"]["processes"] == 2
    assert load_run(shared / "from two").info["environment"]["processes"] == 1


@pytest.mark.parametrize("size", [2, 7, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_image_is_in_one_share(size: int, world: int) -> None:
    batch = torch.randperm(size)
    shares = [Shard(rank, world).of(batch) for rank in range(world)]
    assert torch.cat(shares).tolist() == batch.tolist()
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("augment", ["none", "small"])
def test_three_processes_see_what_one_sees_of_batches_they_cannot_share_evenly(
    images: Path, augment: str
) -> None:
    folder = {**FOLDER, "data": str(images), "batch_size": 7}
    for values in (folder, {"batch_size": 100, "augment": augment}):
        config = RunConfig.from_mapping({**VALUES, **values})
        whole, *shares = (load_data(config, shard=each) for each in THREE)
        for train in (True, False):
            batches = [
                list(data.train_batches(1) if train else data.test_batches())
                for data in (whole, *shares)
            ]
            assert len({len(each) for each in batches[1:]}) == 1
            assert all(len(target) for each in batches for _, target in each)
            if train:
                parts = zip(*batches[1:], strict=True)
                joined = [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]
            else:
                joined = [batch for each in batches[1:] for batch in each]
            for place in (0, 1):
                ours = torch.cat([batch[place] for batch in joined])
                assert torch.equal(ours, torch.cat([batch[place] for batch in batches[0]]))


@pytest.mark.long
def test_three_processes_train_what_one_does(tmp_path: Path) -> None:
    values = {"batch_size": 25, "epochs": 1}
    script = [ROOT / "tests" / "ranks.py", tmp_path, json.dumps({"three": {"values": values}})]
    process = torchrun("--standalone", "--nproc-per-node=3", *script, cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    ranks.train(tmp_path / "one", values)
    ours = weights(tmp_path / "three")
    for key, tensor in weights(tmp_path / "one").items():
        assert (ours[key] - tensor).abs().max() <= 1e-12, key


def test_a_killed_process_is_started_again_and_nothing_is_lost(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    process = start(cwd=tmp_path)
    wait_for(lambda: recorded(tmp_path / "run"))
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "a process was killed (SIGKILL); starting again, 1 of 3" in errors
    assert "Traceback" not in errors
    assert difference(contents(tmp_path / "run"), undisturbed) is None


@pytest.mark.parametrize("typed", ["--force", "--resume", "--resume=auto", "--resume auto"])
def test_processes_that_start_again_are_told_to_go_on_whatever_was_typed(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *OPTIONS, *typed.split(), "--run-dir", "run"]
    monkeypatch.setattr(sys, "argv", ["pgt-diag", *words])
    arguments = _worker_arguments(tmp_path / "run", again=True)
    assert main([*arguments, "--dry-run"]) == 0


def test_what_was_killed_before_its_run_began_starts_as_it_was_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "run" / "run.json"
    info.parent.mkdir()
    info.write_text("an earlier run's")
    told: list[Sequence[str]] = []

    def launch(_: int, arguments: Callable[[bool], Sequence[str]], __: object) -> int:
        told.append(arguments(True))
        info.unlink()
        told.append(arguments(True))
        return 0

    monkeypatch.setattr("pgt_diag.launcher.launch", launch)
    words = ["train", *OPTIONS, "--nproc=2", "--force", f"--run-dir={info.parent}"]
    monkeypatch.setattr(sys, "argv", ["pgt-diag", *words])
    assert main(words) == 0
    before, after = map(set, told)
    assert before == set(words)
    assert after == {*words, "--resume=auto"} - {"--force"}


@pytest.mark.parametrize("fault", ["'--epochs=0'", "None"])
def test_one_of_several_processes_leaves_before_python_ends(fault: str, tmp_path: Path) -> None:
    # While Python ends, a thread of gloo's may abort the process. A fault of ours is told as ever.
    code = (
        "import atexit, os, sys; from pgt_diag.__main__ import main\n"
        "class Last:\n"
        "    def __del__(self, write=os.write): write(1, b'Python ends\\n')\n"
        f"last = Last(); sys.argv = ['pgt-diag', 'train', {fault}]\n"
        "atexit.register(print, 'in order'); sys.exit(main())"
    )
    rank = {"RANK": "0", "WORLD_SIZE": "1"}
    both = []
    for variables, told in ({}, "in order\nPython ends\n"), (rank, "in order\n"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout == told
        both.append((done.returncode, done.stderr.splitlines()[-1]))
    assert both[0] == both[1]
    assert both[0][0] == (1 if fault == "None" else 2)


@pytest.mark.parametrize("killed", [(0,), pytest.param((1, 0), marks=pytest.mark.long)])
def test_torchrun_starts_killed_processes_again_and_nothing_is_lost(
    killed: tuple[int, ...], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    process = torchrun(
        *("--nproc-per-node=2", "--max-restarts=2"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
        *("-m", "pgt_diag", "train", *OPTIONS, "--run-dir=run", "--resume=auto"),
        cwd=tmp_path,
    )
    seen: list[int] = []
    for rank in killed:
        seen += kill_after_a_checkpoint(process, rank, tmp_path / "run", seen)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert len(re.findall(r"going on from iteration [1-9]", out)) == len(killed)
    assert difference(contents(tmp_path / "run"), undisturbed) is None


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)])
def test_nodes_start_killed_processes_again_and_nothing_is_lost(
    victim: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with socket.create_server(("localhost", 0)) as server:
        endpoint = f"localhost:{server.getsockname()[1]}"
    # Two agents stand for two machines. Each counts its own restarts: one of them only.
    nodes = [
        torchrun(
            *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=2"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"),
            *("-m", "pgt_diag", "train", *OPTIONS, "--run-dir=run", "--resume=auto"),
            cwd=tmp_path,
        )
        for _ in range(2)
    ]
    wait_for(lambda: newest_checkpoint(tmp_path / "run") > 0, nodes[victim])
    [started] = children(nodes[victim].pid)
    os.kill(started, signal.SIGKILL)
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    found = load_run(tmp_path / "run")
    assert found.info["environment"]["processes"] == 2
    assert found.info["resumed_from"]
    assert sum(out.count("done: test accuracy") for out, _ in outputs) == 1
    assert difference(contents(tmp_path / "run"), undisturbed) is None


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.long),
    ],
)
def test_a_signal_ends_all_processes_with_a_checkpoint(
    undisturbed: dict[str, Any], tmp_path: Path, sent: signal.Signals
) -> None:
    process = start(cwd=tmp_path)
    wait_for(lambda: recorded(tmp_path / "run"))
    started = children(process.pid)
    process.send_signal(sent)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (out + errors).count("--run-dir run --resume") == 1
    assert not any(map(is_running, started))
    assert load_run(tmp_path / "run").status == "interrupted"
    code, told = run("--resume", cwd=tmp_path)
    assert code == 0, told
    assert difference(contents(tmp_path / "run"), undisturbed) is None


def is_training(path: Path, started: list[int]) -> bool:
    return recorded(path)


def is_starting(path: Path, started: list[int]) -> bool:
    return len(started) == 2


@pytest.mark.parametrize("when", [is_starting, is_training])
def test_no_process_outlives_the_one_that_started_it(
    when: Callable[[Path, list[int]], bool], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    process = start(cwd=tmp_path)
    wait_for(lambda: when(tmp_path / "run", children(process.pid)))
    started = children(process.pid)
    assert len(started) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_running, started)))
    assert recorded(tmp_path / "run") == (when is is_training)
    if when is is_starting:
        return
    code, told = run("--resume=auto", cwd=tmp_path)
    assert code == 0, told
    assert difference(contents(tmp_path / "run"), undisturbed) is None


@pytest.mark.long
def test_a_launcher_that_stands_still_does_not_stop_the_run(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    process = start(cwd=tmp_path)
    wait_for(lambda: recorded(tmp_path / "run"))
    started = children(process.pid)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: not any(map(is_running, started)))
    assert difference(contents(tmp_path / "run"), undisturbed) is None
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_the_batch_size_may_be_that_of_each_process(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *OPTIONS, "--nproc=2", "--batch-per=process", "--dry-run", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["processes"], plan["config"]["batch_size"]) == (2, 18)


def test_processes_meet_each_other_and_not_what_an_earlier_attempt_left() -> None:
    left = torch.distributed.HashStore()
    # The store of every attempt but the first holds all that the ones before wrote.
    for attempt, size in enumerate((3, 3, 2, 4, 1)):
        # In another order each time: the first process may come last.
        order = sorted(range(size), key=lambda rank: (rank + attempt) % size)
        with ThreadPoolExecutor() as threads:
            asked = [threads.submit(unused_part, left, rank, size, 30.0) for rank in order]
            parts = [each.result() for each in asked]
        assert not any(part.check(["address"]) for part in parts)
        parts[0].set("address", str(attempt))
        assert {part.get("address") for part in parts} == {str(attempt).encode()}


def test_who_does_not_come_is_not_awaited_for_ever() -> None:
    left = torch.distributed.HashStore()
    with ThreadPoolExecutor() as threads:
        both = [threads.submit(unused_part, left, rank, 2, 30.0) for rank in range(2)]
        assert all(each.result() for each in both)
    for rank in range(2):
        with pytest.raises(torch.distributed.DistStoreError, match="did not answer"):
            unused_part(left, rank, 2, 0.2)


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    ended, text = run("--batch-size=4", "--accumulate=3", cwd=tmp_path)
    assert ended == 2, text
    assert text.count("pgt-diag: error:") == 1
    assert "2 processes, with accumulate 3, need at least 6 images" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_processes_share(tmp_path: Path) -> None:
    config = RunConfig(dataset="synthetic", image_size=8, stem="small", batch_size=2)
    assert training.plan(config, tmp_path / "run", processes=2).processes == 2
    with pytest.raises(ConfigurationError, match="batch_size is 2: 3 processes"):
        training.plan(config, tmp_path / "run", processes=3)


def test_a_bad_image_in_one_process_ends_all(images: Path, tmp_path: Path) -> None:
    ended, text = run("--dataset=imagefolder", f"--data={images}", "--epochs=9", cwd=tmp_path)
    assert ended == 3, text
    assert "pgt-diag: error: cannot read image" in text


def test_running_statistics_are_those_of_the_first_process(shared: Path) -> None:
    run = load_run(shared / "batch norm")
    assert run.config is not None
    [newest] = checkpoint.found_in(shared / "batch norm")
    with ranks.in_float64():
        model = ranks.SmallNet(run.config.norm).eval()
        model.load_state_dict(checkpoint.load(newest)["model"])
        data = load_data(run.config)
        right = sum((model(x).argmax(1) == target).sum() for x, target in data.test_batches())
    assert run.metrics["test_accuracy"].iloc[-1] == 100 * int(right) / data.test_size


def test_silent_means_silent_on_what_all_processes_see(shared: Path) -> None:
    run = load_run(shared / "own loop")
    silent = run.events[run.events["kind"] == "silent"]
    assert silent["filter"].tolist() == [1]
    assert run.iteration_count == 5
    # Three images of the second process have the feature 2, those of the first one 0.
    np.testing.assert_allclose(run.gap_norms()[0], np.sqrt(3 * 2.0**2), rtol=1e-6)


def test_a_step_that_overflows_in_one_process_is_skipped_by_all(shared: Path) -> None:
    first, second = json.loads((shared / "scaled.json").read_text())
    skipped, overflowed, weights = zip(first, second, strict=True)
    assert skipped[0] == skipped[1]
    assert weights[0] == weights[1]
    assert 0 < sum(overflowed[1]) <= sum(skipped[0]) < len(skipped[0])
    assert not any(overflowed[0]), "the first process alone would have skipped nothing"
    assert load_run(shared / "scaled").iteration_count == skipped[0].count(False)


def test_what_a_machine_needs_is_fetched_once_on_each(shared: Path) -> None:
    on_one_machine, on_two = ["0"], ["0", "1"]
    assert (shared / "calls.txt").read_text().split() == on_one_machine + on_two


def test_bad_images_of_all_processes_are_listed(shared: Path) -> None:
    found = load_run(shared / "folder").info["bad_images"]
    assert [each["path"] for each in found] == ["train/a/7.png", "train/b/3.png"]


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_is_killed_and_nothing_is_lost(
    rank: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    process = start("--peer-timeout=20", cwd=tmp_path)
    wait_for(lambda: recorded(tmp_path / "run"))
    started = children(process.pid)
    os.kill(started[rank], signal.SIGSTOP)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "a process was killed (SIGKILL); starting again, 1 of 3" in errors
    assert not any(map(is_running, started))
    assert difference(contents(tmp_path / "run"), undisturbed) is None
