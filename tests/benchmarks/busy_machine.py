"""How fast training is beside busy neighbours, with different ways for its threads to wait.

    python tests/benchmarks/busy_machine.py [--spins 1000 10000] [--neighbours 0 1 2]

OpenMP's threads spin while they wait for each other, and so take the core from the thread that they
wait for wherever anything else runs. Each setting trains the preset by `pgt_diag.train`, recording
on, in a process of its own; "ours" is training as it is (see `pgt_diag.openmp`), "default" what
OpenMP does by itself, "passive" never spins, "one thread" has nobody to wait for, and `--spins`
names further values of GOMP_SPINCOUNT. A neighbour is a process of equal priority that never
sleeps. Blocks of iterations alternate. Prints one JSON object: for each number of neighbours the
images per second, and the median over rounds, with quartiles, of how many times as long as the
fastest setting of that number each one takes.
Goals (issue 14): at most 1.02 alone, and 1.15 beside neighbours.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from training_step import WARM_UP, Blocks, Ours, Process

from pgt_diag.bench import Spread
from pgt_diag.config import PRESETS, Preset, compose
from pgt_diag.training import train

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
SETTINGS: dict[str, dict[str, str]] = {
    "ours": {},
    "default": {"GOMP_SPINCOUNT": "300000"},  # its own number, and ours keeps its hands off
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def serve(options: argparse.Namespace) -> None:
    """Make blocks of the preset's iterations, for as long as they are asked for."""
    blocks = Blocks(argparse.Namespace(cpu_time=False, steps=options.steps), torch.device("cpu"))
    # One epoch that outlasts the measurement: no evaluation and no checkpoint falls into a block.
    iterations = WARM_UP + options.steps * (2 * options.rounds * len(options.neighbours) + 1)
    one_epoch = {
        "dataset": "synthetic",
        "synthetic_images": PRESETS[Preset(options.preset)]["batch_size"] * iterations,
        "epochs": 1,
        "warmup_epochs": 0.0,
        "schedule": "constant",
        "feature_map_snapshots": 1,
        "checkpoint_every": 10**9,
    }
    config, _ = compose(Preset(options.preset), {}, one_epoch)
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        train(config, Path(folder) / "run", listener=Ours(blocks))


def start(name: str, settings: dict[str, str]) -> Process:
    """Start a training with one setting."""
    plain = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return Process(__file__, name, {**plain, **settings})


class Neighbours:
    """Processes of equal priority that never sleep, but while they are stopped."""

    def __init__(self, most: int) -> None:
        busy = [sys.executable, "-c", "while True: pass"]
        self.processes = [subprocess.Popen(busy) for _ in range(most)]
        self.set(0)

    def set(self, count: int) -> None:
        for index, process in enumerate(self.processes):
            process.send_signal(signal.SIGCONT if index < count else signal.SIGSTOP)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="iterations in a block")
    parser.add_argument("--spins", type=int, nargs="*", default=[])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        serve(options)
        return
    settings = {name: SETTINGS[name] for name in options.settings}
    settings |= {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in options.spins}

    batch = PRESETS[Preset(options.preset)]["batch_size"]
    load_before = os.getloadavg()[0]
    runs = {name: start(name, values) for name, values in settings.items()}
    neighbours = Neighbours(max(options.neighbours))
    found = {}
    try:
        for run in runs.values():
            run.wait()
        for count in options.neighbours:
            neighbours.set(count)
            spent: dict[str, list[float]] = {name: [] for name in runs}
            for index in range(options.rounds):
                for name in list(runs)[:: -1 if index % 2 else 1]:
                    runs[name].block()  # ours takes a second or two to see its neighbours
                    spent[name].append(runs[name].block())
            medians = {name: Spread.of(seconds).median for name, seconds in spent.items()}
            best = spent[min(medians, key=medians.get)]
            found[f"{count} neighbours"] = {
                name: {
                    "images_per_second": round(batch * options.steps / medians[name], 1),
                    "times_the_fastest": {
                        key: round(value, 3)
                        for key, value in asdict(
                            Spread.of([a / b for a, b in zip(seconds, best, strict=True)])
                        ).items()
                    },
                }
                for name, seconds in spent.items()
            }
    finally:
        neighbours.end()
        for run in runs.values():
            run.end()
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "cpus": os.cpu_count(),
                "load_before": load_before,
                "preset": options.preset,
                "rounds": options.rounds,
                "iterations_per_block": options.steps,
                **found,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
