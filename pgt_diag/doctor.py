"""Whether this machine is ready to train and record, and if not, what to do about it.

A check is a function that returns one `Finding`. torch and the other dependencies are imported in
the checks that use them, so that this module also works where they are missing or broken.
"""

import errno
import fcntl
import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pgt_diag
from pgt_diag.config import DatasetName, RunConfig
from pgt_diag.errors import DataError, PgtDiagError
from pgt_diag.machine import busy_cpus, busy_note, usable_cpus

if TYPE_CHECKING:
    from torch import Tensor

_HOME = Path(__file__).resolve().parent.parent
_IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL"}
_TORCH = ("torch", "torchvision")
_REINSTALL_TORCH = (
    "install both from one index: python -m pip install --force-reinstall torch torchvision"
)
_ELSEWHERE = "name a folder that is yours, on a local disk: --run-dir DIR"
_TRUE = {"1", "y", "yes", "true"}  # what torch takes for a yes in its variables
_LITTLE_SPACE = 1 << 30
_TOO_LITTLE_SPACE = 100 << 20
_WRITTEN = 8 << 20
_SLOW_RATE = 5e6
_SLOW_SYNC = 0.5
_SMALL_SHARED_MEMORY = 1 << 30  # a container's default of 64 MB does not hold one large batch
_LITTLE_GPU_MEMORY = 1 << 30


class Status(StrEnum):
    """How a check ended; only a problem keeps the machine from being ready."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it where something is to be done."""

    status: Status
    found: str
    remedy: str | None = None


Check = Callable[[], Finding]


def ok(found: str) -> Finding:
    """Return that all is well."""
    return Finding(Status.OK, found)


def warning(found: str, remedy: str) -> Finding:
    """Return that something is missing or slow, and can be lived with."""
    return Finding(Status.WARNING, found, remedy)


def problem(found: str, remedy: str) -> Finding:
    """Return that something does not work."""
    return Finding(Status.PROBLEM, found, remedy)


def machine_checks(folder: Path) -> dict[str, Check]:
    """Return what training and recording in `folder` need, by name, causes before effects."""
    return {
        "python": check_python,
        "pgt-diag": check_installation,
        "dependencies": check_dependencies,
        "torch": check_torch,
        "environment": check_environment,
        "threads": check_threads,
        "other work": check_other_work,
        "gradients": check_gradients,
        "gpu": check_gpu,
        "digits": check_digits,
        "fashion-mnist": check_fashion_mnist,
        "disk space": lambda: check_space(folder),
        "writing": lambda: check_writing(folder),
        "file locks": lambda: check_locks(folder),
        "shared memory": check_shared_memory,
    }


def examine(check: Check) -> Finding:
    """Return what a check finds; one that fails itself is a problem too."""
    try:
        # What packages say when imported is no part of the answer, which may be JSON.
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            return check()
    except (Exception, SystemExit) as error:  # SystemExit: a package may do anything when imported
        return problem(
            f"could not be checked: {_told(error)}",
            "solve the problems above it first; if there is none, please report this one",
        )


def check_python() -> Finding:
    """Check the interpreter's version."""
    required = _project().requires_python
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if _fits(platform.python_version(), required):
        return ok(found)
    return problem(f"{found}, {required} is needed", f"make a venv of a Python {required}")


def check_installation() -> Finding:
    """Check that the pgt-diag that runs is the one that is installed, if one is."""
    running = pgt_diag.__version__
    try:
        installed = metadata.version("pgt-diag")
    except metadata.PackageNotFoundError:
        return ok(f"{running}, not installed but run from its checkout")
    if installed == running:
        return ok(f"{running}, installed")
    return warning(
        f"{running} runs, but {installed} is installed",
        "reinstall it, or do not run it from a folder that holds another pgt_diag",
    )


def check_dependencies() -> Finding:
    """Check that every dependency is there, new enough, and can be imported."""
    found, wrong, needed = [], [], []
    for requirement in _project().dependencies:
        name = _name(requirement)
        reason = _unmet(requirement) or _import_failure(name)
        if reason:
            wrong.append(reason)
            needed.append(f'"{requirement}"')
        else:
            found.append(f"{name} {metadata.version(name)}")
    if not wrong:
        return ok(", ".join(found))
    return problem("; ".join(wrong), f"python -m pip install --upgrade {' '.join(needed)}")


def check_torch() -> Finding:
    """Check that torch and torchvision work, and are builds that belong together."""
    try:
        torch = importlib.import_module("torch")
        torchvision = importlib.import_module("torchvision")
    except Exception as error:
        reason = _unmet("torch") or _unmet("torchvision")
        versions = reason or ", ".join(f"{n} {metadata.version(n)}" for n in _TORCH)
        return problem(f"{versions}: cannot be imported: {_told(error)}", _REINSTALL_TORCH)
    build = torch.version.cuda or torch.version.hip
    kind = f"built for {'CUDA' if torch.version.cuda else 'ROCm'} {build}" if build else "CPU only"
    found = f"torch {torch.__version__} ({kind}), torchvision {torchvision.__version__}"
    for requirement in metadata.requires("torchvision") or []:
        if _name(requirement) == "torch" and (reason := _unmet(requirement)):
            return problem(f"{found}; this torchvision's {reason}", _REINSTALL_TORCH)
    # Debian's and vendors' builds name none; +cpu beside +cu132 is a mixture.
    variants = {each.__version__.partition("+")[2] for each in (torch, torchvision)} - {""}
    if len(variants) > 1:
        return warning(f"{found}: two different builds", _REINSTALL_TORCH)
    return ok(found)


_VARIABLES = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (
        "lets any checkpoint that does not say otherwise run code when it is loaded"
    ),
    "NVIDIA_TF32_OVERRIDE": "changes the precision of GPU arithmetic, and with it results",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "lowers the precision of GPU arithmetic",
    "ATEN_CPU_CAPABILITY": "makes torch slower on CPUs, and changes the last bits of results",
    "CUDA_LAUNCH_BLOCKING": "makes training on a GPU wait for every kernel",
}
_SHOWN_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
_DETERMINISTIC_WORKSPACES = {":4096:8", ":16:8"}


def check_environment() -> Finding:
    """Check the variables that change results or make reading files unsafe."""
    effects = {
        name: effect
        for name, effect in _VARIABLES.items()
        # An override of 0 changes the precision too; the others are off then.
        if os.environ.get(name, "") not in ("" if name == "NVIDIA_TF32_OVERRIDE" else "0", "")
    }
    unsafe = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if unsafe in effects and os.environ[unsafe].lower() not in _TRUE:
        del effects[unsafe]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace is not None and workspace not in _DETERMINISTIC_WORKSPACES:
        effects["CUBLAS_WORKSPACE_CONFIG"] = (
            f"is {workspace!r}: no setting with which torch's deterministic algorithms work"
        )
    if effects:
        found = "; ".join(f"{name} {effect}" for name, effect in effects.items())
        finding = problem if unsafe in effects else warning
        return finding(found, f"unset {' '.join(effects)}")
    shown = [f"{name}={os.environ[name]}" for name in _SHOWN_VARIABLES if name in os.environ]
    return ok(", ".join(shown) or "no variable that changes results is set")


def check_threads() -> Finding:
    """Check that torch uses the CPUs that this process may use, and no more."""
    import torch

    threads, cpus = torch.get_num_threads(), usable_cpus()
    found = f"torch uses {_plural(threads, 'thread')} on {_plural(cpus, 'CPU')}"
    remedy = f"set OMP_NUM_THREADS={cpus}, or train --threads {cpus}"
    limits = [name for name in _SHOWN_VARIABLES[:2] if name in os.environ]
    if threads > cpus:
        if not limits:
            remedy = f"set OMP_NUM_THREADS={cpus} for loops of your own; train uses {cpus} as it is"
        return warning(f"{found}: they wait for each other", remedy)
    if limits and threads < cpus:
        # Without these variables, torch leaves out hyper-threads, which is right.
        return warning(f"{found}, because {' and '.join(limits)} says so", remedy)
    return ok(found)


def check_other_work() -> Finding:
    """Check that the CPUs are free: training's threads wait for the slowest of them."""
    taken = busy_cpus()
    if (note := busy_note(taken)) is None:
        return ok("the CPUs are free")
    return warning(note, "training on the CPU takes longer until it ends; train fewer runs at once")


def check_gradients() -> Finding:
    """Check that a small convolution trains on the CPU, and twice the same, bit for bit."""
    import torch

    first, second = _gradient("cpu"), _gradient("cpu")
    if not first.isfinite().all():
        return problem("a small convolution's gradients are not finite", _REINSTALL_TORCH)
    if not torch.equal(first, second):
        return problem(
            "a small convolution has other gradients each time: no run can be reproduced",
            "try train --threads 1; if it stays, suspect the memory or the CPU",
        )
    return ok("a small convolution has the same gradients twice, bit for bit (float32, CPU)")


def _gradient(device: str) -> "Tensor":
    """Return the weights' gradient in a small network with fixed weights and images."""
    import torch
    from torch.nn import functional as F

    from pgt_diag.powergrad import power_grad_cross_entropy

    random = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 16, 16, generator=random, dtype=torch.float32).to(device)
    initial = torch.randn(8, 3, 3, 3, generator=random, dtype=torch.float32)
    weight = initial.to(device).requires_grad_()
    logits = F.conv2d(images, weight, padding=1).relu().mean((2, 3))
    target = torch.arange(8, device=device)
    power_grad_cross_entropy(logits, target, alpha=0.25).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return weight.grad.cpu()


def check_gpu() -> Finding:
    """Check every CUDA GPU; where there is none, tell why."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return _worst([_check_device(index) for index in range(torch.cuda.device_count())])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return ok(f"hidden by CUDA_VISIBLE_DEVICES={visible!r}: training uses the CPU")
    if not _nvidia_driver():
        return ok("none (no NVIDIA driver, no nvidia-smi): training uses the CPU")
    if not torch.version.cuda:
        return warning(
            f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA: "
            "training uses the CPU",
            "install a build with CUDA: python -m pip install --force-reinstall torch torchvision",
        )
    reason = "; ".join(str(each.message) for each in told) or "it says nothing about why"
    if visible is not None:
        reason += f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return warning(
        "there is an NVIDIA driver, but torch sees no GPU, and training uses the CPU: " + reason,
        f"see whether nvidia-smi lists a GPU and a driver for CUDA {torch.version.cuda}; start a "
        "container with --gpus all",
    )


def _nvidia_driver() -> bool:
    signs = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
    return shutil.which("nvidia-smi") is not None or any(sign.exists() for sign in signs)


def _check_device(index: int) -> Finding:
    import torch

    device = f"cuda:{index}"
    found = f"{device} {torch.cuda.get_device_name(index)}"
    major, minor = torch.cuda.get_device_capability(index)
    found += f", compute capability {major}.{minor}"
    try:
        with torch.cuda.device(index):
            free, total = torch.cuda.mem_get_info()
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gradient, expected = _gradient(device), _gradient("cpu")
    except Exception as error:
        return problem(
            f"{found}: does not compute: {_told(error)}",
            "install a torch that is built for this GPU and its driver, or train --device cpu",
        )
    found += f", {_bytes(free)} of {_bytes(total)} free"
    if not (gradient - expected).norm() < 0.01 * expected.norm():
        return problem(
            f"{found}: other gradients than the CPU's",
            "update the driver; if it stays, suspect the GPU, and train --device cpu",
        )
    if not bf16:
        return warning(f"{found}, no bf16", "train with --amp fp16 or --amp off")
    if free < _LITTLE_GPU_MEMORY:
        return warning(found, "end what uses its memory: nvidia-smi lists it")
    return ok(f"{found}, bf16")


def check_digits() -> Finding:
    """Check the embedded data set, which is the default."""
    found = _read(DatasetName.DIGITS)
    if isinstance(found, str):
        return ok(found)
    reason, _, remedy = str(found).removeprefix("digits: ").partition("; ")
    return problem(reason, remedy or "python -m pip install --force-reinstall scikit-learn")


def check_fashion_mnist() -> Finding:
    """Check whether Fashion-MNIST is here, whole."""
    found = _read(DatasetName.FASHION_MNIST)
    if isinstance(found, str):
        return ok(found)
    # A missing data set's message names its own remedies.
    reason, _, remedy = str(found).removeprefix("fashion-mnist: ").partition("; ")
    return warning(reason, remedy or "apt install --reinstall dataset-fashion-mnist")


def _read(dataset: DatasetName) -> str | DataError:
    from pgt_diag.data.sources import read_images

    try:
        images = read_images(RunConfig(dataset=dataset))
    except DataError as error:
        return error
    counts = f"{len(images.train_images):,} + {len(images.test_images):,} images"
    return f"{counts} in {images.source}"


def check_space(folder: Path) -> Finding:
    """Check that runs have room."""
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    found = f"{_bytes(free)} free in {place}"
    remedy = "free some, or name a folder elsewhere: --run-dir DIR"
    if free < _TOO_LITTLE_SPACE:
        return problem(found, remedy)
    return warning(found, remedy) if free < _LITTLE_SPACE else ok(found)


def check_writing(folder: Path) -> Finding:
    """Check that files can be written, put on disk and replaced there, and how fast."""
    try:
        with _scratch(folder) as scratch:
            large = _seconds_to_replace(scratch / "large", bytes(_WRITTEN))
            _seconds_to_replace(scratch / "small", b"old")
            small = _seconds_to_replace(scratch / "small", b"new")
            replaced = (scratch / "small").read_bytes() == b"new"
    except OSError as error:
        return problem(f"{folder}: cannot be written: {_told(error)}", _ELSEWHERE)
    if not replaced:
        return problem(f"{folder}: a replaced file keeps its old content", _ELSEWHERE)
    rate = _WRITTEN / large
    found = f"{rate / 1e6:,.0f} MB/s, {1000 * small:,.0f} ms to replace a file"
    if rate < _SLOW_RATE or small > _SLOW_SYNC:
        return warning(f"slow: {found}", "name a folder on a local disk: --run-dir DIR")
    return ok(found)


def _seconds_to_replace(path: Path, content: bytes) -> float:
    start = time.perf_counter()
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return time.perf_counter() - start


def check_locks(folder: Path) -> Finding:
    """Check that a lock keeps a second writer out, which some network disks ignore."""
    try:
        with (
            _scratch(folder) as scratch,
            (scratch / "lock").open("wb") as first,
            (scratch / "lock").open("wb") as second,
        ):
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ok("a second writer is kept out")
    except OSError as error:
        return problem(f"{folder}: no lock can be had: {_told(error)}", _ELSEWHERE)
    return problem(f"{folder}: a lock does not keep a second writer out", _ELSEWHERE)


def check_shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    """Check the room for batches between the processes that decode images and the training."""
    if not place.is_dir():
        return ok(f"this system has no {place}, and needs none")
    free = shutil.disk_usage(place).free
    found = f"{_bytes(free)} free in {place}"
    if free < _SMALL_SHARED_MEMORY:
        return warning(
            f"{found}: little for the workers of --dataset imagefolder",
            "start the container with --shm-size=8g, or train --workers 0",
        )
    return ok(found)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a temporary folder where runs would be."""
    with tempfile.TemporaryDirectory(prefix=".pgt-diag-doctor-", dir=_existing(folder)) as made:
        yield Path(made)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists: a run makes the others."""
    folder = folder.resolve()
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file")
    return place


@dataclass(frozen=True)
class _Project:
    requires_python: str
    dependencies: list[str]


def _project() -> _Project:
    """Return what pgt-diag requires: by its checkout, where it runs from one, or as installed."""
    file = _HOME / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "pgt-diag":
            return _Project(project["requires-python"], project["dependencies"])
    try:
        found = metadata.metadata("pgt-diag")
    except metadata.PackageNotFoundError:
        raise PgtDiagError(
            "neither installed nor in a checkout with its pyproject.toml; install it with pip"
        ) from None
    needs = metadata.requires("pgt-diag") or []
    return _Project(found["Requires-Python"], [each for each in needs if "extra ==" not in each])


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _unmet(requirement: str) -> str | None:
    """Return in what the installed version does not meet a requirement such as `plotly>=7,<8`."""
    name = _name(requirement)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    # Markers such as `; python_version < "3.12"` hold no condition on the version itself.
    conditions = requirement.partition(";")[0][len(name) :].strip(" ()")
    if _fits(version, conditions):
        return None
    return f"{name} is {version}, {conditions} is needed"


def _fits(version: str, conditions: str) -> bool:
    """Tell whether the release numbers fit; those of a nightly or vendor's build count as final."""
    have = _release(version)
    compare = {
        ">=": have.__ge__,
        "<=": have.__le__,
        "==": have.__eq__,
        "<": have.__lt__,
        ">": have.__gt__,
    }
    return all(
        compare[operator](_release(limit))
        for operator, limit in re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", conditions)
    )


def _release(version: str) -> tuple[int, ...]:
    """Return the release's numbers, trailing zeros dropped: 8.0 is no less than 8."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _import_failure(name: str) -> str | None:
    if name in _TORCH:
        return None  # checked together, with a remedy of their own
    try:
        importlib.import_module(_IMPORT_NAMES.get(name, name))
    except Exception as error:
        return f"{name} cannot be imported: {_told(error)}"
    return None


def _worst(findings: list[Finding]) -> Finding:
    """Return several findings as one, with the worst status and every remedy."""
    order = list(Status)
    remedies = dict.fromkeys(each.remedy for each in findings if each.remedy)
    return Finding(
        max((each.status for each in findings), key=order.index),
        "; ".join(each.found for each in findings),
        "; ".join(remedies) or None,
    )


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s'[: count != 1]}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
