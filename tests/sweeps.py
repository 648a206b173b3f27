"""Small sweeps, in this process and in others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pgt_diag.sweep.grid import Row, build_grid

ROOT = Path(__file__).parent.parent
TINY = {
    "preset": "smoke",
    "dataset": "synthetic",
    "synthetic_images": 64,
    "synthetic_classes": 3,
    "image_size": 32,
    "model": "squeezenet1_1",  # few weights, and dropout: random numbers are drawn in every step
    "epochs": 2,
    "warmup_epochs": 1.0,
    "batch_size": 8,
    "lr": 0.01,
    "feature_map_snapshots": 2,
    "checkpoint_every": 2,
    "threads": 1,
    "device": "cpu",
}
DIVERGING = {"lr": 1e30, "warmup_lr": 1e30}


def rows_of(**values: Any) -> tuple[Row, ...]:
    return build_grid(None, {**TINY, **values}).rows


def options(values: dict[str, Any]) -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in values.items()]


def start(*arguments: str | Path, cwd: Path, **extra: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (cwd / "empty.toml").touch()
    return subprocess.Popen(
        [sys.executable, "-m", "pgt_diag", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **extra,
    )


def sweep_command(values: dict[str, Any]) -> list[str]:
    return ["sweep", "--config=empty.toml", *options({**TINY, **values}), "--sweep-dir=runs"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_for(what: Any, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


class Stop:
    """Asks for the end after so many looks, as Ctrl-C at that instant."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks < 0
