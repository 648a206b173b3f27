"""The process that started this one, as one of several: nobody else would end it."""

import ctypes
import os
import signal
import sys

LAUNCHER = "PGT_DIAG_LAUNCHER"
"""Where `sweep` tells `train --nproc`, and that its processes, the number of its own process."""
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have this process killed when the one that started it dies, or at once if it is dead."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(LAUNCHER, parent)):
        os.kill(os.getpid(), signal.SIGKILL)
