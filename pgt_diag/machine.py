"""What of this machine a process may use. Standard library only."""

import math
import os
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
