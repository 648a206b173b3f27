"""How long until something happens: `pgt-diag --help`, and `pgt-diag train` until its first step.

    python tests/benchmarks/startup.py [--rounds 7]

Runs whole commands in turn, in rounds: an empty Python, `--help`, an `import torch` alone, one that
also makes an optimizer (which loads torch's compiler, whoever trains), and a training on the
embedded digits that ends after its first iteration. Prints one JSON object: median, smallest and
largest of the wall-clock times and, less shaken by other load, of the CPU times (all threads).
Goals (issue 5): `--help` within 10 times an empty Python; the first step within 2 s beyond
importing torch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from commands.app import main; sys.exit(main(sys.argv[1:]))"
OPTIMIZER = "import torch; torch.optim.SGD([torch.zeros(1, requires_grad=True)])"
FIRST_STEP = """
import os, sys
import commands.console
commands.console.TrainingConsole.iterated = lambda *_: os._exit(0)
from commands.app import main
main(sys.argv[1:])
sys.exit("no iteration came")
"""


def seconds(code: str, *arguments: str, folder: str) -> tuple[float, float]:
    """Run code in a process of its own; return its wall-clock and its CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(process.args)}")
    return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    commands = {
        "python": ["pass"],
        "help": [MAIN, "--help"],
        "torch": ["import torch"],
        "optimizer": [OPTIMIZER],
        "train": [FIRST_STEP, "train", "--run-dir", "run", "--force"],
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds + 1):
            names = list(commands) if index % 2 else list(reversed(commands))
            for name in names:
                both = seconds(*commands[name], folder=folder)
                if index:  # the first round only fills the file cache
                    spent[name].append(both)
    result: dict[str, object] = {"cpus": os.cpu_count(), "rounds": rounds}
    for place, clock in enumerate(("wall", "cpu")):
        times = {name: [both[place] for both in values] for name, values in spent.items()}
        pairs = {"help_ratio": [a / b for a, b in zip(times["help"], times["python"], strict=True)]}
        for base in ("torch", "optimizer"):
            pairs[f"first_step_beyond_{base}"] = [
                a - b for a, b in zip(times["train"], times[base], strict=True)
            ]
        result[clock] = {
            name: [round(value, 3) for value in (statistics.median(values), *limits(values))]
            for name, values in {**times, **pairs}.items()
        }
    print(json.dumps(result, indent=2))


def limits(values: list[float]) -> tuple[float, float]:
    """Return the smallest and the largest."""
    return min(values), max(values)


if __name__ == "__main__":
    main()
