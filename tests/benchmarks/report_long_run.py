"""Measure 500,000 iterations of 4,800 filters, from disk.

    python tests/benchmarks/report_long_run.py [--iterations 500000] [--keep DIRECTORY]

Writes a run directory through the recorder's own encoder, with made-up measurements in blocks as
large as the recorder's, then runs `pgt-diag report` and `pgt-diag show` on it as processes. Prints
what the trace costs to write and to store, and each command's wall time and peak memory, beside
those of a command that only imports. Budgets (issues 3 and 5): report ≤ 60 s and a few hundred MB
above its imports; trace ≤ 100 µs per iteration and ≤ 150 MB.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pgt_diag.config import RunConfig
from pgt_diag.directory import METRICS_FILE, RunDirectory
from pgt_diag.encoder import Block, TraceEncoder, default_record_every, layer_slices
from pgt_diag.filters import COLLAPSED_RATIO, ZEROED_RATIO
from pgt_diag.reading import Layer
from reports.demo import RESNET18

ROOT = Path(__file__).parents[2]
BLOCK, FLUSH, EPOCHS, DEATHS = 32, 1024, 100, 48
FILTERS, FEATURES = sum(filters for _, filters in RESNET18), 512
COMMAND = "from commands.app import main; assert main(sys.argv[1:]) == 0"
IMPORTS = "import pgt_diag.run, reports.page, commands.app"
# Not getrusage: a child's peak counts that of the process it was forked from.
PEAK = """
import sys
{}
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(line.split()[1], file=sys.stderr)
"""


def blocks(count: int) -> Iterator[Block]:
    """Yield blocks of smooth weight norms, noisy gradient norms, and filters that die for good.

    The noise comes from a pool drawn once, at another offset each time: drawing it anew would take
    longer than all else.
    """
    rng = np.random.default_rng(0)
    pool = rng.lognormal(0, 0.4, 4 * BLOCK * FILTERS).astype(np.float32)
    initial = rng.uniform(0.8, 1.4, FILTERS).astype(np.float32)
    drift = rng.normal(0, 0.3, FILTERS).astype(np.float32)
    dying = rng.choice(FILTERS, DEATHS, replace=False)
    instant = (rng.beta(2, 5, DEATHS) * count).astype(int)
    for first in range(0, count, BLOCK):
        step = np.arange(first, min(first + BLOCK, count))
        size = (len(step), FILTERS)
        share = (step / count).astype(np.float32)[:, None]
        start = int(rng.integers(0, len(pool) - BLOCK * FILTERS))
        noise = pool[start : start + len(step) * FILTERS].reshape(size)
        weights = initial * (1 + drift * share) + np.float32(1e-4) * noise
        gradients, activity = noise * np.float32(0.01), noise.copy()
        dead = step[:, None] >= instant
        gradients[:, dying] *= ~dead
        activity[:, dying] *= ~dead
        weights[:, dying] *= np.exp(-np.maximum(step[:, None] - instant, 0) * 2e-4)
        scalars = np.stack(
            (
                6.9 - 5 * share[:, 0] + 0.1 * noise[:, 0],
                70 * share[:, 0] + noise[:, 1],
                0.2 * (1 + np.cos(np.pi * share[:, 0])),
                noise[:, 2],
                noise[:, 2],
                np.full(len(step), np.nan),
            ),
            axis=1,
        )
        yield Block(
            weights, gradients, np.full(size, np.nan, np.float32), activity,
            activity[:, -FEATURES:], scalars.astype(np.float32), np.zeros(len(step), bool),
        )  # fmt: skip


def write_run(path: Path, count: int) -> float:
    """Write the run directory; return the CPU seconds spent in the encoder."""
    names = [name for name, _ in RESNET18]
    filters = [filters for _, filters in RESNET18]
    every, min_spell = default_record_every(count), max(1, round(count / 1000))
    directory = RunDirectory.create(path)
    info = {"model": "resnet18", "record_every": every, "min_spell": min_spell}
    info |= {"planned_iterations": count, "iterations_per_epoch": count // EPOCHS}
    config = RunConfig.from_mapping({"dataset": "synthetic", "epochs": EPOCHS, "batch_size": 256})
    layers = [asdict(Layer(n, i, f, (f, 64, 3, 3), "")) for i, (n, f) in enumerate(RESNET18)]
    directory.update(info | {"status": "running", "config": config.to_mapping(), "layers": layers})
    source = blocks(count)
    block = next(source)
    slices, ratios = layer_slices(names, filters), (COLLAPSED_RATIO, ZEROED_RATIO)
    encoder = TraceEncoder(
        path, slices, block.weight_norms[0], record_every=every, min_spell=min_spell, ratios=ratios
    )
    spent = 0.0
    while block is not None:
        start = time.thread_time()
        encoder.add(block)
        if encoder.iterations % FLUSH == 0:
            encoder.flush()
        spent += time.thread_time() - start
        block = next(source, None)
    start = time.thread_time()
    sealed = encoder.seal(complete=True)
    spent += time.thread_time() - start
    for epoch in range(EPOCHS):
        accuracy = {"train_accuracy": 60 + epoch / 10, "test_accuracy": 60 + epoch / 11}
        done = (epoch + 1) * count // EPOCHS
        directory.append_metrics({"epoch": epoch, "iteration": done} | accuracy)
    directory.finish("finished", sealed=sealed)
    return spent


def measured(code: str, *arguments: str | Path) -> tuple[float, float]:
    """Run code in a process of its own; return its seconds and its peak memory in MB."""
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", PEAK.format(code), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
    )
    return time.perf_counter() - start, int(result.stderr.split()[-1]) / 1024


def main() -> None:
    """Write the run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500_000)
    parser.add_argument("--keep", type=Path, help="write the run here, or measure the one here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "run"
        if not (path / METRICS_FILE).exists():
            spent = write_run(path, options.iterations)
            print(f"trace: {1e6 * spent / options.iterations:.0f} µs CPU per iteration", flush=True)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"run directory: {size / 1e6:.0f} MB", flush=True)
        output = Path(folder) / "report.html"
        seconds, baseline = measured(IMPORTS)
        print(f"imports alone: {seconds:.1f} s, {baseline:.0f} MB")
        for name in (("report", path, "-o", output), ("show", path)):
            seconds, peak = measured(COMMAND, *name)
            print(f"{name[0]}: {seconds:.1f} s, {peak:.0f} MB, {peak - baseline:.0f} MB more")
        print(f"page: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
