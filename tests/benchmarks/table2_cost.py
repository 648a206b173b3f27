"""What the paper's tables cost on ImageNet-1K: operations and memory counted, time from a rate.

    python tests/benchmarks/table2_cost.py [IMAGES_PER_SECOND]

Counts what `pgt-diag sweep --dry-run` counts, with ImageNet's numbers instead of a folder's. The
rate is that of `pgt-diag bench --size 224` on the machine in question; with none given, one
training step is timed here, at the batch that the memory of a small machine holds.
"""

import sys
import time

import torch

from pgt_diag.bench import alternate, training_step
from pgt_diag.config import RunConfig
from pgt_diag.cost import IMAGENET, flops_per_image, run_cost
from pgt_diag.models import build_model
from pgt_diag.sweep.grid import SweepPreset, build_grid
from pgt_diag.training import build_optimizer

BATCH = 32
DAY = 86_400


def measured_rate() -> float:
    """Return images per second of the non-BN ResNet-18's training step at 224 px, on this CPU."""
    model = build_model("resnet18", num_classes=1000).train()
    images = torch.randn(BATCH, 3, 224, 224)
    target = torch.randint(1000, (BATCH,))
    step = training_step(model, build_optimizer(model, RunConfig(lr=1e-4)), images, target)
    step()
    return BATCH / sorted(alternate({"step": step}, rounds=5)["step"])[2]


def main() -> None:
    """Print a line for each preset: runs, operations, days, and the memory of its largest step."""
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else measured_rate()
    per_image = flops_per_image(build_model("resnet18", num_classes=1000), 224)
    print(
        f"{rate:.3g} images/s of non-BN ResNet-18 at 224 px: {rate * per_image / 1e9:.3g} GFLOP/s"
    )
    for preset in (SweepPreset.TABLE1, SweepPreset.TABLE2, SweepPreset.TABLE3):
        rows = build_grid(preset, options={"seed": [0]}).rows
        began = time.perf_counter()
        costs = [run_cost(row.config, **IMAGENET) for row in rows]
        flops = sum(cost.flops for cost in costs)
        largest = max(costs, key=lambda cost: cost.memory_bytes)
        print(
            f"{preset}: {len(rows)} runs a seed, {flops:.3g} FLOP, "
            f"{flops / per_image / rate / DAY:,.3g} days at that rate; a step keeps up to "
            f"{largest.memory_bytes / 1e9:.3g} GB in float32 "
            f"({largest.bytes_per_image / 1e6:.3g} MB an image, {largest.images_at_once} at once); "
            f"counted in {time.perf_counter() - began:.1f} s"
        )


if __name__ == "__main__":
    main()
