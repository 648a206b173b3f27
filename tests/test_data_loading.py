"""Loader processes: kept between epochs, deaf to signals meant for all, gone when not needed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from pgt_diag import machine
from pgt_diag.config import DatasetName, RunConfig
from pgt_diag.data import images as images_module
from pgt_diag.data import load_data
from pgt_diag.data.images import decode

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or multiprocessing.get_start_method() != "fork",
    reason="looks at forked processes in /proc",
)
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                color = (20 * number, 255 * label, 99)
                Image.new("RGB", (40, 40), color).save(root / split / name / f"{number}.jpg")
    return root


def open_folder(root, workers=2):
    config = RunConfig(
        dataset=DatasetName.IMAGEFOLDER,
        data=str(root),
        batch_size=4,
        image_size=32,
        workers=workers,
    )
    return load_data(config)


@pytest.fixture
def data(root):
    data = open_folder(root)
    yield data
    data.close()


def worker_pids():
    return {process.pid for process in multiprocessing.active_children()}


def lives(pid):
    """Whether a process runs; one that has ended and waits to be asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, seconds=60):
    deadline = time.monotonic() + seconds
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "worker processes still live"
        time.sleep(0.02)


def send(number, pids):
    """Signal from a process that is not the workers' parent, as a terminal or Slurm does."""
    subprocess.run(["kill", f"-{int(number)}", *map(str, pids)], check=True)


def assert_same(one, two):
    for parts in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


# How many


@pytest.mark.parametrize(
    ("cpus", "beside", "expected"), [(1, 1, 1), (6, 1, 6), (64, 1, 16), (64, 8, 8), (2, 4, 1)]
)
def test_by_default_there_is_a_process_for_each_cpu_of_this_one(
    root, monkeypatch, cpus, beside, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
    assert open_folder(root, workers=None)._loader.workers == expected
    assert open_folder(root, workers=0)._loader.workers == 0


# Kept between epochs


def test_one_set_of_processes_makes_all_epochs_and_the_tests_between(root, data):
    alone = open_folder(root, workers=0)
    before = worker_pids()
    seen = set()
    for epoch in (0, 1, 7):
        assert_same(data.train_batches(epoch), alone.train_batches(epoch))
        seen |= worker_pids() - before
        assert_same(data.test_batches(), alone.test_batches())
        assert_same(data.train_batches(epoch, start=4), alone.train_batches(epoch, start=4))
        assert list(data.train_batches(epoch, start=6)) == []
    assert len(seen) == 2
    assert worker_pids() - before == seen
    data.close()
    wait_until_gone(seen)
    assert_same(data.train_batches(3), alone.train_batches(3))


def test_batches_asked_for_while_others_are_made_mix_nothing_up(root, data):
    alone = open_folder(root, workers=0)
    before = worker_pids()
    train, other, test = data.train_batches(0), data.train_batches(1), data.test_batches()
    interleaved = list(zip(train, other, strict=True))
    assert_same([one for one, _ in interleaved], alone.train_batches(0))
    assert_same([two for _, two in interleaved], alone.train_batches(1))
    assert_same(test, alone.test_batches())
    assert len(worker_pids() - before) == 2  # only one set waits for an epoch


def test_batches_abandoned_half_way_leave_no_process_and_no_trace(root, data):
    alone = open_folder(root, workers=0)
    before = worker_pids()
    batches = data.train_batches(0)
    next(batches)
    pids = worker_pids() - before
    assert len(pids) == 2
    batches.close()
    wait_until_gone(pids)
    assert worker_pids() == before
    assert_same(data.train_batches(0), alone.train_batches(0))


def test_a_dropped_data_set_leaves_no_process(root):
    data, before = open_folder(root), worker_pids()
    list(data.train_batches(0))
    pids = worker_pids() - before
    del data
    wait_until_gone(pids)


def test_abandoning_does_not_wait_for_a_slow_batch(root, data, monkeypatch):
    def slow(path):
        time.sleep(1)  # a batch: 4 seconds
        return decode(path)

    before = worker_pids()
    monkeypatch.setattr(images_module, "decode", slow)
    batches = data.train_batches(0, start=3)
    next(batches)  # the last one is in the making
    pids = worker_pids() - before
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 2.5
    wait_until_gone(pids, seconds=1)


# Signals


@pytest.mark.parametrize("number", STOPPING)
def test_workers_go_on_when_everything_is_signalled(root, data, number):
    expected = list(open_folder(root, workers=0).train_batches(0))
    before = worker_pids()
    batches = data.train_batches(0)
    received = [next(batches)]
    pids = worker_pids() - before
    for _ in range(3):
        send(number, pids)
        received.append(next(batches))
    received += batches
    assert_same(received, expected)
    assert worker_pids() - before == pids
    assert_same(data.train_batches(0), expected)
    data.close()
    wait_until_gone(pids)


def in_a_group_of_its_own(root, pipe):
    """Open loader after loader, under fire, as a training loop that leaves signals for later."""
    os.setsid()
    for number in STOPPING:
        signal.signal(number, lambda *_: None)
    expected = list(open_folder(root, workers=0).train_batches(0))
    pipe.send("ready")
    for _ in range(10):
        data = open_folder(root)
        assert_same(data.train_batches(0), expected)
        data.close()
    pipe.send("survived")


def start(target, *arguments):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def test_signals_to_the_whole_group_harm_no_loader_not_even_one_just_starting(root):
    process, pipe = start(in_a_group_of_its_own, root)
    assert pipe.recv() == "ready"
    sent = 0
    while not pipe.poll(0.003):
        os.killpg(process.pid, STOPPING[sent % 3])
        sent += 1
    assert pipe.recv() == "survived"
    process.join()
    assert sent > 50


def half_way(root, pipe):
    data = open_folder(root)
    batches = data.train_batches(0)
    next(batches)
    pipe.send(worker_pids())
    time.sleep(600)


def test_workers_vanish_when_the_main_process_is_killed(root):
    process, pipe = start(half_way, root)
    pids = pipe.recv()
    assert len(pids) == 2
    assert all(lives(pid) for pid in pids)
    process.kill()
    process.join()
    wait_until_gone(pids)


AT_EXIT = """
import multiprocessing, sys
from tests.test_data_loading import open_folder
data = open_folder(sys.argv[1])
list(data.train_batches(0))              # a set of processes that waits for the next epoch
batches, other = data.train_batches(1), data.train_batches(2)
next(batches), next(other)               # two that are at work
print(*(child.pid for child in multiprocessing.active_children()))
sys.keep_alive = data, batches, other
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1)], ids=["end", "exit", "error"]
)
def test_python_ends_at_once_with_loaders_alive(root, ending, code):
    result = subprocess.run(
        [sys.executable, "-c", AT_EXIT.format(ending=ending), str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == code
    assert "DataLoader" not in result.stderr
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 4
    wait_until_gone(pids, seconds=2)
