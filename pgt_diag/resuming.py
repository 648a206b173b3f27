"""Where a run can go on: the newest intact checkpoint whose trace is intact as well."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgt_diag import checkpoint, storage, trace
from pgt_diag.config import RunConfig
from pgt_diag.data.changes import check_description
from pgt_diag.data.contents import Contents
from pgt_diag.directory import is_claimed
from pgt_diag.errors import ConfigurationError, RunDirectoryError
from pgt_diag.reading import (
    check_columns,
    check_info,
    is_amount,
    is_count,
    is_locked,
    read_layers,
)
from pgt_diag.run import load_run


@dataclass(frozen=True)
class ResumePoint:
    """What a run goes on from.

    `checkpoint` and `state`, its content, are None for a run that was killed before its first one,
    when nothing was recorded: it starts again. `damaged` says what was found damaged and is not
    used.
    """

    config: RunConfig
    checkpoint: Path | None
    state: Mapping[str, Any] | None
    finished: bool
    damaged: tuple[str, ...]
    recorded: int | None = None
    """Iterations on disk, of which those after the checkpoint are made again; None if unknown."""


def resume_point(directory: Path) -> ResumePoint:
    """Find where the run in `directory` goes on; nothing is changed.

    Raises RunDirectoryError when there is no run, another process writes it, it diverged, or
    nothing intact is left to go on from.
    """
    if is_locked(directory) and not is_claimed(directory):
        raise RunDirectoryError(f"{directory}: is being written by another run")
    damaged: list[str] = []
    stored: RunConfig | None = None
    status, iterations = "interrupted", 0
    recorded: int | None = None
    try:
        run = load_run(directory)
        stored, status = run.config, run.status
        iterations = recorded = run.iteration_count
    except RunDirectoryError as error:
        if not checkpoint.found_in(directory):
            raise
        damaged.append(str(error))
    if stored is None and not damaged:
        raise RunDirectoryError(
            f"{directory}: was not made by `pgt-diag train`; your own loop resumes it with "
            "FilterRecorder(..., resume=...)"
        )
    if status == "diverged":
        raise RunDirectoryError(
            f"{directory}: this run diverged, and going on would repeat it; start another one with "
            "a lower lr, a longer warmup_epochs, or method gc or agc"
        )
    if status == "finished" and stored is not None:
        return ResumePoint(stored, None, None, finished=True, damaged=())
    for path, state in checkpoint.intact(directory):
        if isinstance(state, RunDirectoryError):
            damaged.append(str(state))
            continue
        try:
            config = _config(path, state)
            _check_state(path, state)
            _check_trace(directory, path, state)
        except RunDirectoryError as error:
            damaged.append(str(error))
        else:
            return ResumePoint(
                config, path, state, finished=False, damaged=tuple(damaged), recorded=recorded
            )
    if stored is not None and not damaged and iterations == 0:
        return ResumePoint(stored, None, None, finished=False, damaged=(), recorded=0)
    what = (
        "; ".join(damaged) or f"{iterations:,} iterations are recorded, and no checkpoint is left"
    )
    raise RunDirectoryError(
        f"{directory}: nothing intact to go on from ({what}); start it again with `force=True`, "
        "or in another directory"
    )


def _config(path: Path, state: Mapping[str, Any]) -> RunConfig:
    values = state.get("config")
    if not isinstance(values, dict):
        raise RunDirectoryError(f"{path}: is no checkpoint of pgt-diag")
    try:
        return RunConfig.from_mapping(values, source=f"{path}: config")
    except (ConfigurationError, TypeError) as error:
        raise RunDirectoryError(str(error)) from None


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raise RunDirectoryError for what training and recording would stumble over later.

    Whether weights and momentum fit the model is seen when they are loaded.
    """
    try:
        recorder, position = state["recorder"], state["position"]
        _check_recorder(path, recorder)
        counts = (recorder["steps"], position["epoch"], position["batch"])
        amounts = (recorder["seconds"], recorder["training_seconds"], *state["meter"].values())
        if not all(map(is_count, counts)) or not all(map(is_amount, amounts)):
            raise ValueError("a count or a time cannot be")
        if tuple(position["sums"].shape) != (2,):
            raise ValueError("the sums are not two")
        if type(position.get("extra", 0)) is not int:
            raise TypeError("its steps are not counted")
        for contents in (state.get("data") or {}).values():
            Contents.from_state(contents)
    except (*_ODD, RunDirectoryError) as error:
        raise RunDirectoryError(f"{path}: is no checkpoint of pgt-diag: {error!r}") from None


_ODD = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What entries of the wrong kind raise."""
_QUANTITIES = ("weight_norm", "gradient_norm", "clip_factor", "gap_norm")


def _check_recorder(path: Path, recorder: Mapping[str, Any]) -> None:
    info = json.loads(recorder["directory"]["info"])
    check_info(info, path)
    read_layers(path, info.get("layers"))
    environment, amp = info["environment"], info["amp"]
    resumed, replaced = info.get("resumed_from") or [], info.get("bad_images") or []
    if not isinstance(environment, dict) or not isinstance(amp, str):
        raise TypeError("the environment is not told")
    if not all(map(is_count, resumed)) or not all(
        isinstance(each["path"], str) for each in replaced
    ):
        raise TypeError("its resumptions or bad images are not listed")
    check_description(info["data"])
    settings = recorder["settings"]
    if not all(is_count(settings[key]) for key in ("record_every", "min_spell")):
        raise TypeError("its settings are no counts")
    if not isinstance(recorder["directory"]["metrics"], str):
        raise TypeError("its metrics are no text")
    encoder = recorder["encoder"]
    if encoder is None:
        return
    names = ("iterations", "event_count", "stored_count")
    counts = [*(encoder[name] for name in names), encoder["last_stored"] + 1]
    if not all(map(is_count, counts)) or encoder["iterations"] > recorder["steps"]:
        raise ValueError("its counts cannot be")
    if encoder["spells"]["next_iteration"] != encoder["iterations"]:
        raise ValueError("its spells are of another iteration")
    if len(encoder["latest"]) != 2 or not all(isinstance(x, float) for x in encoder["latest"]):
        raise ValueError("its loss and accuracy are no numbers")
    filters = recorder["layers"][-1][1]
    widths = {name: math.prod(values.shape) for name, values in encoder["last"].items()}
    for name, width in widths.items():
        if name not in _QUANTITIES or (width != filters and name != "gap_norm"):
            raise ValueError(f"its rows of {name} are not of {filters} filters")
    for name, window in encoder["windows"].items():
        if [tuple(each.shape) for each in window] != [(widths[name],)] * 2:
            raise ValueError(f"its window of {name} is not of that many")


def _check_trace(directory: Path, path: Path, state: Mapping[str, Any]) -> None:
    """Raise RunDirectoryError unless what was recorded before a checkpoint is there, undamaged."""
    try:
        encoder = state["recorder"]["encoder"]
        if encoder is None:
            return
        iterations, events = int(encoder["iterations"]), int(encoder["event_count"])
        stored, last_stored = int(encoder["stored_count"]), int(encoder["last_stored"])
    except _ODD as error:
        raise RunDirectoryError(f"{path}: is no checkpoint of pgt-diag: {error!r}") from None
    for name, end in ((trace.ITERATIONS_FOLDER, iterations), (trace.EVENTS_FOLDER, events)):
        reached = 0
        for part in _parts_before(directory / name, end):
            if part.first != reached:
                break
            if name == trace.EVENTS_FOLDER:
                _check_events(part)
            reached = part.last + 1
        if reached < end:
            raise RunDirectoryError(f"{directory / name}: row {reached:,} of {end:,} is missing")
    found = 0
    for part in _parts_before(directory / trace.NORMS_FOLDER, last_stored + 1):
        try:
            table = part.read(["iteration"])
            check_columns(table, part.path)
        except KeyError as error:
            raise RunDirectoryError(f"{part.path}: damaged: {error}") from None
        found += int((table["iteration"].to_numpy() <= last_stored).sum())
    if found != stored:
        folder = directory / trace.NORMS_FOLDER
        raise RunDirectoryError(f"{folder}: {found:,} of {stored:,} stored rows are there")


def _check_events(part: trace.Part) -> None:
    """Raise RunDirectoryError for a part that cannot be joined with those to come."""
    try:
        table = part.read()
    except KeyError as error:
        raise RunDirectoryError(f"{part.path}: damaged: {error}") from None
    if table.schema != trace.EVENT_SCHEMA or table.num_rows != part.last - part.first + 1:
        raise RunDirectoryError(f"{part.path}: not the events that belong there")


def _parts_before(folder: Path, end: int) -> list[trace.Part]:
    storage.check_no_link(folder)
    found = [part for part in trace.parts(folder) if part.first < end]
    for part in found:
        part.verify()
    return found
