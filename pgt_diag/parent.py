"""Being one of several processes that somebody has started: how such a one ends."""

import atexit
import ctypes
import os
import signal
import sys

LAUNCHER = "PGT_DIAG_LAUNCHER"
"""Where `sweep` tells `train --nproc`, and that its processes, the number of its own process."""
_PR_SET_PDEATHSIG = 1


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
