"""What a recorded run says, as plain values to compare: everything but times."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pgt_diag import checkpoint, storage
from pgt_diag.directory import RunDirectory, open_info, seal_info
from pgt_diag.run import load_run

TIMES = ("seconds", "images_per_second", "recorder_seconds")


def contents(path: Path) -> dict[str, Any]:
    """Return all that `load_run` gives of a finished run, and the weights it ended with."""
    run = load_run(path)
    values: dict[str, Any] = {
        "status": run.status,
        "metrics": run.metrics.drop(columns=list(TIMES), errors="ignore"),
        "iterations": run.iterations,
        "events": run.events,
        "brief spells": run.brief_spells,
        "GAP": run.gap_norms(),
    }
    for layer in run.layers:
        for window in (None, "min", "max"):
            values[f"{layer.name} weight {window}"] = run.weight_norms(layer.name, window)
            values[f"{layer.name} gradient {window}"] = run.gradient_norms(layer.name, window)
        values[f"{layer.name} clip"] = run.clip_factors(layer.name)
    for kind in ("silent", "zero_gradient", "collapsed", "zeroed", "clipped"):
        values[f"{kind} counts"] = run.state_counts(kind)
    for each in run.feature_maps:
        values[f"maps {each.iteration}"] = each.maps
    [newest] = checkpoint.found_in(path)
    state = checkpoint.load(newest)
    for name, tensor in state["model"].items():
        values[f"weight {name}"] = tensor.numpy()
    for index, buffers in state["optimizer"]["state"].items():
        values[f"momentum {index}"] = buffers["momentum_buffer"].numpy()
    values["random numbers"] = [each["cpu"].tolist() for each in state["random"]]
    info = json.loads((path / "run.json").read_text())
    values |= {key: info[key] for key in ("config", "layers", "gap_source", "planned_iterations")}
    return values


def edit(path: Path, **values: Any) -> None:
    """Change run.json as pgt-diag would have written it."""
    file = path / "run.json"
    storage.write(file, seal_info(open_info(file.read_bytes()) | values))


@contextlib.contextmanager
def being_written(path: Path) -> Iterator[None]:
    """Hold the run directory as the process that records it does."""
    directory = RunDirectory(path)
    directory.lock()
    try:
        yield
    finally:
        directory.unlock()


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return the first thing that is not the same to the bit in two runs."""
    if one.keys() != other.keys():
        return f"only in one: {sorted(one.keys() ^ other.keys())}"
    return next((name for name in one if not _same(one[name], other[name])), None)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame):
        return one.equals(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return bool(one == other)
