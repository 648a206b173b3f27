"""What of this machine a process may use. Standard library only."""

import math
import os
import time
from pathlib import Path

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, within its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(count, math.ceil(quota)) if quota else count)


def usable_threads(chosen: int) -> int:
    """Return how many of the threads that torch has `chosen` to use.

    torch knows nothing of a container's quota: with more threads than that, all of them are
    stopped for most of the time. A number that the environment names is left alone.
    """
    if any(os.environ.get(name) for name in _THREAD_VARIABLES):
        return chosen
    return min(chosen, usable_cpus())


def busy_cpus(looks: int = 10, pause: float = 0.03) -> float:
    """Return how many CPUs other work takes now: the mean of some looks, `pause` seconds apart.

    From what is ready to run but for this thread; where the system does not say, from the load of
    the last minute.
    """
    found = []
    for _ in range(looks):
        try:
            ready = Path("/proc/loadavg").read_text(encoding="ascii").split()[3]
            found.append(int(ready.partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        time.sleep(pause)
    return sum(found) / len(found)


def busy_note(taken: float) -> str | None:
    """Say that other work takes so many CPUs, where that slows training down; None where not.

    Training uses every CPU, and its threads wait for the slowest of them.
    """
    if taken < _BUSY:
        return None
    count = os.cpu_count() or 1
    return f"the machine is busy: other work takes {min(taken, count):.1f} of its {count} CPUs"


_BUSY = 0.5


def cpu_quota(groups: Path, root: Path) -> float | None:
    """Return the CPUs that the control groups (version 1 or 2) allow, or None for all."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers
        group = top / path.lstrip("/")
        quotas += [
            _quota(place) for place in (group, *group.parents) if top in (place, *place.parents)
        ]
    return min((quota for quota in quotas if quota), default=None)


def _quota(group: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            allowed, period = " ".join((group / name).read_text() for name in files).split()
            if allowed not in ("max", "-1"):
                return int(allowed) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None
