"""A row's run made by several processes that share every batch: `pgt-diag train --nproc`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pgt_diag.config import Decode
from pgt_diag.data import load_data
from pgt_diag.errors import DataError, NoSpaceError, PgtDiagError
from pgt_diag.parent import LAUNCHER
from pgt_diag.sweep.grid import Row

_LOOK_SECONDS = 0.5
_INTERRUPTED = 130
_ERROR = "pgt-diag: error: "


def train_in_processes(
    row: Row,
    directory: Path,
    processes: int,
    *,
    accept_changed_data: bool = False,
    look: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """Make a row's run, or go on with it; `look` is called now and then meanwhile.

    When this process is killed, so are those. Raises DataError for data that cannot be opened,
    NoSpaceError for a full disk, KeyboardInterrupt when `stop` said so and it has stopped with a
    checkpoint, and PgtDiagError, with the last line that was told, for anything else.
    """
    command = row.command(directory, processes)
    command += ["--accept-changed-data"] if accept_changed_data else []
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgt_diag", *command[1:], "--json"],
            stdout=subprocess.DEVNULL,
            stderr=told,
            env={**os.environ, LAUNCHER: str(os.getpid())},
            start_new_session=True,  # a terminal's Ctrl-C comes to it through us
        )
        try:
            asked = False
            while process.poll() is None:
                if stop() and not asked:
                    process.terminate()
                    asked = True
                look()
                time.sleep(_LOOK_SECONDS)
        finally:
            process.kill()
            process.wait()
        code = process.returncode
        told.seek(0)
        lines = told.read().decode(errors="replace").splitlines()
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code == DataError.exit_code:
        # The same code tells of an image that cannot be read, and of the run's directory.
        load_data(replace(row.config, decode=Decode.CPU))
    if code:
        errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        kind = NoSpaceError if code == NoSpaceError.exit_code else PgtDiagError
        raise kind(errors[-1] if errors else f"its processes ended with code {code}")
