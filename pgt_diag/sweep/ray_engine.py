"""A sweep on Ray: a task per row, with CPUs and GPUs of its own, on a machine or a cluster.

The run directories, on a file system that all machines share, hold everything: a task that is
tried again, and a sweep that is started again, go on from what they find there.
"""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgt_diag import storage
from pgt_diag.config import DatasetName, Device
from pgt_diag.errors import ConfigurationError, PgtDiagError
from pgt_diag.machine import usable_cpus
from pgt_diag.sweep.grid import Row
from pgt_diag.sweep.making import SweepListener, is_to_do, make_row
from pgt_diag.sweep.status import RowStatus, State, status_of


def make_rows_on_ray(
    rows: Sequence[Row],
    folder: Path,
    *,
    processes: int = 1,
    address: str | None = None,
    cpus_per_run: float | None = None,
    gpus_per_run: float | None = None,
    retry_failed: bool = False,
    accept_changed_data: bool = False,
    listener: SweepListener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[RowStatus]:
    """Make a sweep's rows in Ray tasks, as many at once as there is room for.

    address: of a cluster, as `ray.init` takes it; by default this machine alone. By default a run
    has a GPU for each of its `processes` where it may use one and there is any, and a CPU for each
    of these and for what reads their images, as far as a machine has as many. Several runs share a
    GPU of which each asks for a part. All processes of a run are on one machine.
    Raises what `making.make_row` does, and ConfigurationError when Ray cannot be used.
    """
    try:
        import ray as module
    except ImportError:
        raise ConfigurationError(
            "engine ray needs Ray, which is not installed; pip install 'pgt-diag[ray]'"
        ) from None
    ray: Any = module  # half of its functions have no types
    listener = listener or SweepListener()
    folder = folder.absolute()
    stop_file = folder / f".stop-{uuid.uuid4().hex}"
    results: dict[Row, RowStatus] = {}
    _connect(ray, address)
    try:
        storage.make_folder(folder)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        task = ray.remote(max_retries=_RETRIES)(_task)
        while len(results) < len(rows):
            active: dict[Any, Row] = {}
            for row in rows:
                if row in results:
                    continue
                status = status_of(row, folder)
                if not is_to_do(status, retry_failed=retry_failed):
                    listener.changed(status)
                    if status.state is not State.RUNNING:
                        results[row] = status
                    continue
                cpus, gpus = _resources(row, machines, processes, cpus_per_run, gpus_per_run)
                placed = task.options(num_cpus=cpus, num_gpus=gpus, name=row.name)
                made = placed.remote(
                    row.anywhere(),
                    folder,
                    stop_file,
                    processes=processes,
                    retry_failed=retry_failed,
                    accept_changed_data=accept_changed_data,
                )
                active[made] = row
            _collect(ray, active, folder, results, listener, stop, stop_file)
            if not active and len(results) < len(rows):
                if stop():
                    raise KeyboardInterrupt
                time.sleep(_LOOK_SECONDS)
    finally:
        ray.shutdown()
        stop_file.unlink(missing_ok=True)
    return [results[row] for row in rows]


_RETRIES = 3
"""How often a task is started again whose process was killed, by a full memory for example."""
_LOOK_SECONDS = 2.0
_CONNECT_SECONDS = 10.0
_LOADERS = 8
"""CPUs that a run on an image folder is given when its number of loading processes is not."""
_Answer = RowStatus | PgtDiagError | None


def _connect(ray: Any, address: str | None) -> None:
    """Start Ray, or connect to a cluster's."""
    if address:
        _check_address(address)
    # Ray's dashboard and its usage report talk to a network; neither is asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray takes SIGTERM for itself; who called us may want it.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else usable_cpus(),
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="warning",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        where = f"ray-address is {address}" if address else "engine is ray"
        raise ConfigurationError(f"{where}, and Ray cannot be used there: {reason}") from None
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_address(address: str) -> None:
    """Raise ConfigurationError when nothing answers there: Ray itself would ask for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or what Ray explains better
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"ray-address is {address}, and nothing answers there ({error}); start the cluster "
            "with `ray start --head`, or leave `ray_address=...` out for this machine alone"
        ) from None


def _task(row: Row, folder: Path, stop_file: Path, **options: Any) -> _Answer:
    """Make a row in a worker, with `make_row`'s options.

    None when it was asked to stop, the error that ends the sweep.
    """
    if stop_file.exists():
        return None
    try:
        return make_row(row, folder, stop=_Look(stop_file), **options)
    except KeyboardInterrupt:
        return None
    except PgtDiagError as error:
        return error


class _Look:
    """Whether a file is there, looked at once a second."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1
        return self._file.exists()


def _collect(
    ray: Any,
    active: dict[Any, Row],
    folder: Path,
    results: dict[Row, RowStatus],
    listener: SweepListener,
    stop: Callable[[], bool],
    stop_file: Path,
) -> None:
    """Wait for tasks; put the rows they made into `results`, and tell how the others stand."""
    waiting = dict(active)
    ending: BaseException | None = None
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=_LOOK_SECONDS)
        for reference in ready:
            row = waiting.pop(reference)
            try:
                answer: _Answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())[:300]
                answer = RowStatus(row, State.FAILED, message=f"its Ray task was lost: {reason}")
            if isinstance(answer, PgtDiagError):
                ending = ending or answer
            elif answer is not None and answer.state is not State.RUNNING:
                results[row] = replace(answer, row=row)
                listener.changed(results[row])
        if ending is None and stop():
            ending = KeyboardInterrupt()
        if ending is not None and not stop_file.exists():
            # Workers write a checkpoint and return; what has not begun returns at its first look.
            stop_file.touch()
        statuses = [status_of(row, folder) for row in waiting.values()]
        running = [status for status in statuses if status.state is State.RUNNING]
        for status in running:
            listener.changed(status)
        if ending is not None and not running:
            break  # what waits for its turn may wait for others than us, and need not be awaited
    if ending is not None:
        raise ending


def _resources(
    row: Row,
    machines: Sequence[dict[str, float]],
    processes: int,
    cpus: float | None,
    gpus: float | None,
) -> tuple[float, float]:
    """Return the CPUs and GPUs of a row's task; machines: what each of the cluster's has.

    Raises ConfigurationError for what no machine has.
    """
    if gpus is None:
        wanted = row.config.device is not Device.CPU and _most("GPU", machines) >= 1
        gpus = processes if wanted else 0
    with_gpus = [machine for machine in machines if machine.get("GPU", 0) >= gpus]
    if cpus is None:
        cpus = min(processes * max(1, _loaders(row)), _most("CPU", with_gpus) or 1)
    for name, asked, found in (("GPU", gpus, machines), ("CPU", cpus, with_gpus)):
        if asked > _most(name, found):
            besides = " that has the GPUs" if gpus and name == "CPU" else ""
            raise ConfigurationError(
                f"{name.lower()}s-per-run is {asked:g}, and no machine of Ray's{besides} has more "
                f"than {_most(name, found):g} {name}s; a run would wait for ever"
            )
    return cpus, gpus


def _loaders(row: Row) -> int:
    if row.config.workers is not None:
        return row.config.workers
    return _LOADERS if row.config.dataset is DatasetName.IMAGEFOLDER else 0


def _most(name: str, machines: Sequence[dict[str, float]]) -> float:
    return max((machine.get(name, 0) for machine in machines), default=0)
