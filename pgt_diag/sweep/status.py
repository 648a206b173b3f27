"""How a sweep's rows stand, read from their directories alone."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pgt_diag import storage
from pgt_diag.directory import CHECKPOINTS_FOLDER, RUN_FILE, what_is_left
from pgt_diag.errors import PgtDiagError
from pgt_diag.reading import is_locked
from pgt_diag.run import Run, load_run
from pgt_diag.sweep.grid import Row, deciding

PLAN_FILE = "sweep.json"
"""In a sweep's directory: which runs the newest sweep there makes, for whoever watches it."""

_MAX_PLAN_BYTES = 1 << 24


def write_plan(rows: Iterable[Row], folder: Path) -> None:
    """Write down which runs a sweep is about to make."""
    storage.make_folder(folder)
    text = json.dumps({"rows": [row.name for row in rows]}, indent=1) + "\n"
    storage.write(folder / PLAN_FILE, text.encode())


def planned_names(folder: Path) -> list[str]:
    """Return the names of the runs that the newest sweep in a folder makes; [] where none says."""
    try:
        plan = json.loads(storage.read(folder / PLAN_FILE, _MAX_PLAN_BYTES))
        return [name for name in plan["rows"] if _is_plain_name(name)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, PgtDiagError):
        return []


def _is_plain_name(name: object) -> bool:
    """Whether it names something in the folder itself: anybody may have written the plan."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name:
        return False
    return Path(name).name == name


class State(StrEnum):
    """What a row's directory holds."""

    NEW = "new"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class RowStatus:
    """One row: its state, iterations recorded and planned, and why it failed."""

    row: Row
    state: State
    done: int = 0
    planned: int | None = None
    message: str | None = None
    test_accuracy: float | None = None
    seconds: float | None = None
    """How long a finished run took, where one process made it from start to end."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        config = self.row.config
        return {
            "name": self.row.name,
            "state": str(self.state),
            "method": str(config.method),
            "alpha": config.alpha if config.method.uses_pgt else None,
            "batch_size": config.batch_size,
            "lr": config.peak_lr,
            "lr_rule": str(config.lr_rule),
            "seed": config.seed,
            "iterations": self.done,
            "planned_iterations": self.planned,
            "test_accuracy": self.test_accuracy,
            "message": self.message,
        }


def status_of(row: Row, folder: Path) -> RowStatus:
    """Return how a row stands; `folder` is the sweep's directory."""
    directory = folder / row.name
    locked = is_locked(directory)
    left = what_is_left(directory)
    if not left:
        return RowStatus(row, State.RUNNING if locked else State.NEW)
    if CHECKPOINTS_FOLDER in left and RUN_FILE not in left:
        # Which it goes on from, or fails with what is wrong with them.
        return RowStatus(row, State.RUNNING if locked else State.INTERRUPTED)
    try:
        run = load_run(directory)
        config = run.config
        if config is None or deciding(config) != deciding(row.config):
            message = f"{directory}: holds a run of another configuration; move it away"
            return RowStatus(row, State.FAILED, message=message)
        state = _STATES.get(run.status, State.FAILED)
        return RowStatus(
            row,
            State.RUNNING if locked else state,
            done=run.iteration_count,
            planned=run.info.get("planned_iterations"),
            message=run.info.get("message") if state is State.FAILED else None,
            test_accuracy=_test_accuracy(run) if state is State.FINISHED else None,
            seconds=_seconds(run) if state is State.FINISHED else None,
        )
    except PgtDiagError as error:
        # What another process is just writing may not fit together yet.
        state = State.RUNNING if locked else State.FAILED
        return RowStatus(row, state, message=None if locked else str(error))


_STATES = {
    "running": State.INTERRUPTED,  # not locked: `Run` says so only where a process writes
    "interrupted": State.INTERRUPTED,
    "finished": State.FINISHED,
}


def _test_accuracy(run: Run) -> float | None:
    """Return the best epoch's, as Table 2 does."""
    return float(run.metrics["test_accuracy"].max()) if len(run.metrics) else None


def _seconds(run: Run) -> float | None:
    if run.info.get("resumed_from"):
        return None
    try:
        start, end = (datetime.fromisoformat(str(run.info[key])) for key in ("created", "ended"))
    except (KeyError, ValueError):
        return None
    return (end - start).total_seconds()
