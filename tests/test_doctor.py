"""`pgt-diag doctor`: what it says of this machine, and of every way a machine can be broken."""

import errno
import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import plotly.offline
import pytest
import torch

from commands import doctor as command
from commands.app import main
from pgt_diag import doctor, machine, preflight
from pgt_diag.doctor import Status
from tests.hostile import HOSTILE

ROOT = Path(__file__).parent.parent
NAMES = [
    "packages", "python", "pgt-diag", "dependencies", "torch", "environment", "threads",
    "other work", "gradients", "gpu", "digits", "fashion-mnist", "disk space", "writing",
    "file locks", "shared memory", "report", "browser",
]  # fmt: skip
Usage = namedtuple("Usage", "total used free")


def run(*arguments, cwd, path=(), **variables):
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return subprocess.run(
        [sys.executable, "-m", "pgt_diag", "doctor", *map(str, arguments)],
        cwd=cwd,
        env={**environment, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def quick(monkeypatch):
    """Replace all checks by one, which the test sets, so that the command itself is quick."""

    def replace(check):
        monkeypatch.setattr(doctor, "machine_checks", lambda folder: {"it": check})
        for name in ("check_packages", "check_report", "check_browser"):
            monkeypatch.setattr(command, name, lambda: doctor.ok("fine"))

    return replace


def test_one_line_for_each_check_and_nothing_left_behind(tmp_path):
    result = run(cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    *lines, last = result.stdout.splitlines()
    found = [re.fullmatch(r"(ok|warning) +(\S+(?: \S+)?) {2,}(\S.*)", line) for line in lines]
    assert [match[2] for match in found] == NAMES
    for match in found:
        assert (match[1] == "warning") == ("; to do: " in match[3])
    assert re.fullmatch(r"ready: 0 problems, \d warnings?", last)
    assert "\x1b" not in result.stdout
    assert not any(tmp_path.iterdir())


def test_json_is_one_object_and_broken_packages_are_problems_not_tracebacks(tmp_path):
    broken = tmp_path / "packages"
    broken.mkdir()
    noisy = "print('hello'); import sys; "
    (broken / "rich.py").write_text(noisy + "raise ImportError('no \\x1b[2Jrich')")
    (broken / "torch.py").write_text(noisy + "sys.exit('gone')")
    result = run("--json", cwd=tmp_path, path=[broken])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    answer = json.loads(result.stdout)
    assert set(answer) == {"ok", "checks"}
    assert answer["ok"] is False
    assert [check["name"] for check in answer["checks"]] == NAMES
    assert all(set(each) == {"name", "status", "found", "remedy"} for each in answer["checks"])
    of = {check["name"]: check for check in answer["checks"]}
    assert of["dependencies"]["status"] == "problem"
    assert "rich cannot be imported: ImportError: no" in of["dependencies"]["found"]
    assert re.search(r'pip install --upgrade "rich>=[\d.]+"$', of["dependencies"]["remedy"])
    assert of["torch"]["status"] == of["gradients"]["status"] == "problem"
    assert "gone" in of["torch"]["found"]
    assert of["writing"] == of["writing"] | {"status": "ok", "remedy": None}


@pytest.mark.parametrize("folder", ["/proc/nowhere", "file/below", "x" * 300])
def test_a_folder_that_cannot_be_written_ends_with_code_1(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    folder = Path(folder)
    checks = {name: doctor.machine_checks(folder)[name] for name in ("writing", "file locks")}
    monkeypatch.setattr(doctor, "machine_checks", lambda folder: checks)
    assert main(["doctor", f"--run-dir={folder}"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"(?m)^problem +writing .*cannot be written.*; to do: .*--run-dir DIR", output)
    assert re.search(r"(?m)^problem +file locks .*; to do: .*--run-dir DIR", output)
    assert output.splitlines()[-1].startswith("not ready: 2 problems")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o500)
    assert doctor.check_writing(tmp_path / "run").status is Status.PROBLEM


def test_a_warning_is_no_problem(quick, capsys):
    quick(lambda: doctor.warning("slow", "wait"))
    assert main(["doctor"]) == 0
    assert "ready: 0 problems, 1 warning\n" in capsys.readouterr().out


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_machine_calls_itself_cannot_act_on_the_terminal(hostile, quick, capsys):
    def check():
        raise ValueError(hostile)

    quick(check)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert not set(output) & {chr(sign) for sign in (*range(10), *range(11, 32), 127)}
    assert len(output.splitlines()) == 5
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_colours_only_where_they_are_wanted(quick, monkeypatch, capsys):
    quick(lambda: doctor.ok("fine"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    main(["doctor"])
    assert "\x1b[32mok" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["doctor"])
    assert "\x1b" not in capsys.readouterr().out


def test_help_has_examples_and_loads_neither_torch_nor_the_checks(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "pgt-diag doctor" in capsys.readouterr().out.partition("Examples:")[2]
    code = "import sys; from commands.app import main; main(['doctor', '--help'])"
    code += "; assert not {'torch', 'numpy', 'pgt_diag.doctor'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_interrupting_it_is_no_problem_found(quick):
    def check():
        raise KeyboardInterrupt

    quick(check)
    assert main(["doctor"]) == 130


# Dependencies


@pytest.mark.parametrize(
    ("version", "conditions", "fits"),
    [
        ("2.11.0", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.15.0+cu132", ">=2.11", True),
        ("2.11.0a0+6b1a2c3.nv26.1", ">=2.11", True),
        ("8.0.0", ">=7,<8", False),
        ("8.0.0rc1", ">=7,<8", False),
        ("7.9", "<8,>=7", True),
        ("0.26", "==0.26.0", True),
        ("0.26.1", "==0.26.0", False),
        ("3.11.7", ">=3.11", True),
        ("3.10.14", ">=3.11", False),
    ],
)
def test_versions_are_compared_as_numbers(version, conditions, fits):
    assert doctor._fits(version, conditions) is fits


def test_old_missing_and_broken_dependencies_each_have_their_place(monkeypatch):
    known = doctor.metadata.version

    def version(name):
        if name == "pandas":
            raise doctor.metadata.PackageNotFoundError(name)
        return {"plotly": "6.5.0"}.get(name) or known(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    finding = doctor.check_dependencies()
    assert finding.status is Status.PROBLEM
    assert finding.found == "pandas is not installed; plotly is 6.5.0, >=7,<8 is needed"
    assert finding.remedy == 'python -m pip install --upgrade "pandas>=2.2" "plotly>=7,<8"'


def test_without_a_checkout_the_installed_requirements_count(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_HOME", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    needs = ["torch>=99", 'pytest>=99; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    assert doctor._project().dependencies == ["torch>=99"]
    assert doctor.check_python().status is Status.PROBLEM
    finding = doctor.check_dependencies()
    assert (finding.status, "pytest" in finding.found) == (Status.PROBLEM, False)


def test_a_copy_without_any_metadata_is_told(monkeypatch, tmp_path):
    def none(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "_HOME", tmp_path)
    monkeypatch.setattr(doctor.metadata, "metadata", none)
    finding = doctor.examine(doctor.check_python)
    assert finding.status is Status.PROBLEM
    assert "install it with pip" in finding.found


def test_another_version_than_the_installed_one(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "99.0")
    finding = doctor.check_installation()
    assert finding.status is Status.WARNING
    assert "99.0 is installed" in finding.found


def test_torchvision_of_another_build(monkeypatch):
    known = importlib.import_module

    def mixed(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return known(name)

    monkeypatch.setattr(doctor.importlib, "import_module", mixed)
    finding = doctor.check_torch()
    assert finding.status is Status.PROBLEM
    assert "torchvision::nms does not exist" in finding.found
    assert "--force-reinstall torch torchvision" in finding.remedy


def test_torchvision_that_wants_another_torch_and_a_mixture_that_still_imports(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.15.0+cpu")
    monkeypatch.setattr(importlib.import_module("torchvision"), "__version__", "0.29.2+cu132")
    assert doctor.check_torch().status is Status.WARNING
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy", "torch (==2.3.1)"])
    finding = doctor.check_torch()
    assert finding.status is Status.PROBLEM
    assert "==2.3.1 is needed" in finding.found


def test_packages_of_other_people_with_our_names(monkeypatch, tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "__init__.py").touch()
    assert command.check_packages().status is Status.OK
    monkeypatch.syspath_prepend(tmp_path)
    finding = command.check_packages()
    assert finding.status is Status.WARNING, "ours is loaded already"
    assert str(tmp_path / "reports") in finding.found
    monkeypatch.delitem(sys.modules, "reports")
    finding = command.check_packages()
    assert finding.status is Status.PROBLEM
    assert str(tmp_path / "reports") in finding.found
    assert "pipx" in finding.remedy


# Environment, threads, gradients, GPU


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1", Status.PROBLEM),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TRUE", Status.PROBLEM),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0", Status.OK),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "no", Status.OK),
        ("NVIDIA_TF32_OVERRIDE", "0", Status.WARNING),
        ("CUDA_LAUNCH_BLOCKING", "1", Status.WARNING),
        ("CUDA_LAUNCH_BLOCKING", "0", Status.OK),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", Status.OK),
        ("CUBLAS_WORKSPACE_CONFIG", "none", Status.WARNING),
        ("PYTHONHASHSEED", "7", Status.OK),
    ],
)
def test_variables_that_change_results_or_make_loading_unsafe(name, value, status, monkeypatch):
    monkeypatch.setenv(name, value)
    finding = doctor.check_environment()
    assert finding.status is status
    if status is not Status.OK:
        assert finding.remedy == f"unset {name}"


def test_threads(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    for threads, status in ((2, Status.OK), (4, Status.OK), (5, Status.WARNING)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert doctor.check_threads().status is status
    assert "OMP_NUM_THREADS=4" in doctor.check_threads().remedy
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS says so" in doctor.check_threads().found
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert "--threads 4" in doctor.check_threads().remedy


@pytest.mark.parametrize(
    ("ready", "status"), [("1/99", Status.OK), ("2/99", Status.WARNING), ("9/99", Status.WARNING)]
)
def test_other_work_on_the_machine_is_told(ready, status, tmp_path, monkeypatch):
    (tmp_path / "loadavg").write_text(f"0.00 0.00 0.00 {ready} 12345")
    place = machine.Path
    monkeypatch.setattr(machine, "Path", lambda _: place(tmp_path / "loadavg"))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    finding = doctor.check_other_work()
    assert finding.status is status
    if status is Status.WARNING:
        assert f"other work takes {min(int(ready[0]) - 1, 4):.1f} of its 4 CPUs" in finding.found


def test_gradients_that_differ_or_are_not_finite(monkeypatch):
    assert doctor.check_gradients().status is Status.OK
    gradients = iter([torch.ones(2), torch.tensor([1.0, 1.0000001])])
    monkeypatch.setattr(doctor, "_gradient", lambda device: next(gradients))
    finding = doctor.check_gradients()
    assert (finding.status, "--threads 1" in finding.remedy) == (Status.PROBLEM, True)
    monkeypatch.setattr(doctor, "_gradient", lambda device: torch.tensor([torch.nan]))
    assert "not finite" in doctor.check_gradients().found


def test_checks_leave_the_random_numbers_alone():
    before = torch.get_rng_state()
    doctor.check_gradients()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("driver", "build", "visible", "status", "told"),
    [
        (False, "13.2", None, Status.OK, "no NVIDIA driver"),
        (True, None, None, Status.WARNING, "built without CUDA"),
        (True, "13.2", None, Status.WARNING, "your driver is too old"),
        (True, "13.2", "7", Status.WARNING, "CUDA_VISIBLE_DEVICES='7'"),
        (True, "13.2", "", Status.OK, "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_is_no_gpu(driver, build, visible, status, told, monkeypatch):
    def unavailable():
        warnings.warn("your driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = doctor.examine(doctor.check_gpu)
    assert finding.status is status
    assert told in finding.found
    assert (finding.remedy is None) is (status is Status.OK)


@pytest.fixture
def gpus(monkeypatch):
    """Two made-up GPUs that compute as the CPU does."""
    gradient = doctor._gradient("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card\x1b{index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20e9, 24e9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(doctor, "_gradient", lambda device: gradient)
    return monkeypatch


def test_gpus_that_work_and_gpus_that_do_not(gpus):
    finding = doctor.check_gpu()
    assert finding.status is Status.OK
    assert "cuda:1 Card\x1b1, compute capability 8.6, 20.0 GB of 24.0 GB free, bf16" in (
        finding.found
    )
    gpus.setattr(torch.cuda, "mem_get_info", lambda: (2e6, 24e9))
    assert doctor.check_gpu().status is Status.WARNING
    gpus.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    finding = doctor.check_gpu()
    assert (finding.status, "--amp fp16" in finding.remedy) == (Status.WARNING, True)
    gpus.setattr(doctor, "_gradient", lambda device: torch.ones(2) * (device == "cuda:1") + 1)
    finding = doctor.check_gpu()
    assert (finding.status, "other gradients" in finding.found) == (Status.PROBLEM, True)

    def failing(device):
        raise RuntimeError("no kernel image is available")

    gpus.setattr(doctor, "_gradient", failing)
    finding = doctor.check_gpu()
    assert finding.status is Status.PROBLEM
    assert "no kernel image" in finding.found
    assert finding.remedy.count("--device cpu") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_real_gpu():
    finding = doctor.check_gpu()
    assert finding.status is not Status.PROBLEM, finding
    assert torch.cuda.get_device_name(0) in finding.found


# Data, disk, report


def test_a_data_set_that_is_absent_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "DEBIAN_FASHION_MNIST", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    finding = doctor.check_fashion_mnist()
    assert finding.status is Status.WARNING
    assert str(tmp_path) in finding.found
    assert "apt install dataset-fashion-mnist" in finding.remedy
    for name in preflight.IDX_NAMES:
        (tmp_path / name).write_bytes(b"no images")
    finding = doctor.check_fashion_mnist()
    assert (finding.status, "--reinstall" in finding.remedy) == (Status.WARNING, True)
    assert doctor.check_digits().status is Status.OK


@pytest.mark.parametrize(
    ("free", "status"), [(0, Status.PROBLEM), (5 << 28, Status.OK), (1 << 29, Status.WARNING)]
)
def test_little_space(free, status, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: Usage(9, 9, free))
    assert doctor.check_space(tmp_path / "not" / "yet").status is status
    expected = Status.OK if status is Status.OK else Status.WARNING
    assert doctor.check_shared_memory(tmp_path).status is expected


def test_no_shared_memory_folder_is_no_fault(tmp_path):
    assert doctor.check_shared_memory(tmp_path / "shm").status is Status.OK


def test_a_full_and_a_slow_disk(monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor.os, "fsync", full)
    finding = doctor.check_writing(tmp_path)
    assert finding.status is Status.PROBLEM
    assert "No space left on device" in finding.found
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(doctor.os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    assert doctor.check_writing(tmp_path).status is Status.WARNING
    assert not any(tmp_path.iterdir())


def test_a_disk_without_locks_and_one_that_ignores_them(monkeypatch, tmp_path):
    assert doctor.check_locks(tmp_path).status is Status.OK

    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    finding = doctor.check_locks(tmp_path)
    assert finding.status is Status.PROBLEM
    assert "No locks available" in finding.found
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    finding = doctor.check_locks(tmp_path)
    assert finding.status is Status.PROBLEM
    assert "second writer" in finding.found


def test_a_plotly_of_another_major_version(monkeypatch):
    assert command.check_report().status is Status.OK
    monkeypatch.setattr(plotly.offline, "get_plotlyjs_version", lambda: "99.0.0")
    finding = command.check_report()
    assert finding.status is Status.PROBLEM
    assert "99.0.0" in finding.found
    assert "pip install" in finding.remedy


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system opens pages itself")
def test_a_browser_is_what_could_show_a_page_here(tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.check_browser().status is Status.WARNING
    assert command.check_browser().found == "no browser, and there is no display to show a page on"
    browser = tmp_path / "chromium"
    browser.touch(mode=0o755)
    found = command.check_browser()
    assert found.status is Status.WARNING
    assert found.found == "chromium is installed, but there is no display to show a page on"
    monkeypatch.setenv("DISPLAY", ":0")
    assert command.check_browser() == doctor.ok("chromium")
    browser.rename(tmp_path / "xdg-open")
    assert command.check_browser() == doctor.ok("xdg-open")
    # What a remote editor sets opens pages on another machine, with no display here.
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("BROWSER", str(tmp_path / "xdg-open"))
    assert command.check_browser().status is Status.OK
