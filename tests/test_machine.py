"""What of the machine is ours: one answer for all that start threads and processes."""

import os

import pytest
import torch

from pgt_diag import bench, doctor, launcher, machine, training
from pgt_diag.config import Device, RunConfig
from pgt_diag.data.loading import BatchLoader
from pgt_diag.errors import ConfigurationError

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("line", "files", "quota"),
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        (
            "1:cpu,cpuacct:/gone",
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/", {"memory/cpu.max": "1 1"}, None),
        ("0::/", {"cpu.max": "garbage"}, None),
        ("0::/", {}, None),
        ("garbage", {"cpu.max": "200000 100000"}, 2.0),
    ],
)
def test_a_containers_share_of_the_cpus(line, files, quota, tmp_path):
    (tmp_path / "groups").write_text(f"9:name=systemd:/\n{line}\n")
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert machine.cpu_quota(tmp_path / "groups", tmp_path / "root") == quota
    assert machine.cpu_quota(tmp_path / "no such file", tmp_path / "root") is None


@pytest.fixture
def container(monkeypatch):
    """Let 64 CPUs be there, of which the quota allows two and a half, and torch choose 4 threads.

    Returns the threads that torch is told to use; told so in earnest, forked processes could hang.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine, "cpu_quota", lambda *_: 2.5)
    for name in (*VARIABLES, launcher.LAUNCHER, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever a test makes of it
        monkeypatch.delenv(name)
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


def test_the_quota_counts_and_so_does_the_affinity(container, monkeypatch):
    assert machine.usable_cpus() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert machine.usable_cpus() == 1


def test_loaders_are_no_more_than_the_quota(container):
    loader = BatchLoader(lambda *_: None, None, pin_memory=False)
    assert loader.workers == 3


def test_the_launchers_processes_share_the_quota(container, monkeypatch):
    monkeypatch.setattr(launcher, "_run", lambda *_: [])
    monkeypatch.setattr(launcher.logging, "disable", lambda _: None)
    assert launcher.launch(3, lambda _: [], print) == 0
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_training_and_bench_take_no_more_threads_than_the_quota(container, tmp_path):
    training.plan(RunConfig(device=Device.CPU), tmp_path)
    assert container == [4, 3]
    container.append(4)
    with pytest.raises(ConfigurationError, match="cannot train on images of 1×1"):
        bench.bench(device=torch.device("cpu"), model_name="alexnet", image_size=1)
    assert container == [4, 3, 4, 3]
    assert training.environment(torch.device("cpu"))["cpu_count"] == 3


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "--threads"])
def test_a_number_that_somebody_chose_stays(container, name, monkeypatch, tmp_path):
    threads = None
    if name == "--threads":
        threads = 4
    else:
        monkeypatch.setenv(name, "4")
    training.plan(RunConfig(device=Device.CPU, threads=threads), tmp_path)
    assert torch.get_num_threads() == 4


def test_the_doctor_asks_the_same_question(container):
    assert "4 threads on 3 CPUs: they wait for each other" in doctor.check_threads().found
