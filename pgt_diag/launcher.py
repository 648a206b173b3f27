"""Starts the processes of one data parallel run on this machine, and starts them again."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pgt_diag.machine import usable_cpus
from pgt_diag.parent import LAUNCHER, end_with_parent

RESTARTS = 3
_INTERRUPTED = 130


def launch(
    processes: int,
    arguments: Callable[[bool], Sequence[str]],
    tell: Callable[[str], None],
) -> int:
    """Run `python -m pgt_diag` in so many processes; return the exit code of the first to fail.

    arguments: the command line, given whether an earlier attempt may have left a run to go on
    with. Processes that a signal killed are started again, three times at most; all others end
    with the one that fails. `tell` gets a line for people.
    """
    if LAUNCHER in os.environ:
        end_with_parent()
    # The processes have told what there is to tell.
    logging.disable(logging.CRITICAL)
    # With the store shared, a killed process hung or aborted every third restart.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    name = ""
    for attempt in range(RESTARTS + 1):
        codes = _run(processes, arguments(attempt > 0))
        # When one ends, the others are told to by SIGTERM.
        killed = [code for code in codes if code < 0 and code != -signal.SIGTERM]
        if not killed:
            return _code_that_says_most(codes)
        name = signal.Signals(-killed[0]).name
        if attempt < RESTARTS:
            tell(f"a process was killed ({name}); starting again, {attempt + 1} of {RESTARTS}")
    tell(f"a process was killed ({name}) once more; go on with `resume=...`")
    return 1


def _code_that_says_most(codes: Sequence[int]) -> int:
    """Return the code of who failed first: the others then end with 1, or as if interrupted."""
    errors = [code for code in codes if code > 1 and code != _INTERRUPTED]
    if errors or not codes:
        return errors[0] if errors else 0
    return max(codes) if max(codes) > 0 else _INTERRUPTED


def _run(processes: int, arguments: Sequence[str]) -> list[int]:
    """Run one attempt; return the exit codes of the processes that failed."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pgt_diag", *arguments)
    except ChildFailedError as error:
        return [failure.exitcode for failure in error.failures.values()]
    except SignalException:
        return [_INTERRUPTED]
    return []
