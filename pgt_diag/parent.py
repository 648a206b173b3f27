"""Being one of several processes that somebody has started: how such a one ends."""

import atexit
import ctypes
import os
import signal
import sys
from dataclasses import dataclass

from pgt_diag.errors import ConfigurationError

LAUNCHER = "PGT_DIAG_LAUNCHER"
"""Where `sweep` tells `train --nproc`, and that its processes, the number of its own process."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, over all machines and on its own."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def place() -> Place:
    """Return this process's place among those that train together, as torchrun tells it.

    Raises ConfigurationError, naming the environment variable, for what torchrun does not say.
    """
    found = {name: os.environ[name] for name in _PLACE if name in os.environ}
    for name, text in found.items():
        if not (text.isascii() and text.isdecimal()):
            raise ConfigurationError(
                f"{name} is {text[:100]!r} in the environment, and no whole number; {_REMEDY}"
            )
    size = int(found.get("WORLD_SIZE", "1"))
    if size == 1:
        return Place()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigurationError(
                f"WORLD_SIZE is {size} in the environment, and {name} is not set; {_REMEDY}"
            )
    rank, local_rank = int(found["RANK"]), int(found["LOCAL_RANK"])
    if not local_rank <= rank < size:
        raise ConfigurationError(
            f"RANK is {rank}, LOCAL_RANK {local_rank} and WORLD_SIZE {size} in the environment, "
            f"which cannot be; {_REMEDY}"
        )
    return Place(rank, local_rank, size)


_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_REMEDY = "start the processes with torchrun, or unset WORLD_SIZE"


def is_launched() -> bool:
    """Whether this is one of the processes that torchrun, or `--nproc`, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leave(code: int) -> int:
    """End one of several processes with this code, at once; return it in any other process.

    A thread of gloo's that gives a tensor back while Python ends aborts the process, and whoever
    started it believes that it was killed, and starts it again.
    """
    if is_launched():
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                code = code or 1
        os._exit(code)
    return code


def end_with_parent() -> None:
    """Have this process killed when the one that started it dies, or at once if it is dead."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(LAUNCHER, parent)):
        os.kill(os.getpid(), signal.SIGKILL)
