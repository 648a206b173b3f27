"""What the PGT loss and our AGC cost, against cross_entropy and timm's AGC.

    python tests/benchmarks/loss_and_clipping.py [--seconds 20] [--threads 1]

Prints one JSON object. Time ratios come from alternating blocks, forward and backward at 1,024
examples × 1,000 classes. How long a tensor of 4 MB takes depends on whether the allocator hands it
out of memory it already has: "own heap" lets glibc keep what was freed, as other allocators and a
GPU's do; "default" returns it to the system, and takes page faults for every new tensor. With
--threads 1 the time is that thread's CPU time, which other load disturbs less. Memory is that of
tensors, counted by storage. The loss's share of a step is that of the step's own logits, 128 × 10.
Goals (issue 5): at most 1.05 times cross_entropy's time and 1.00 times its memory, 0.1 % of a step;
AGC at least twice as fast as timm's; "with norms" is AGC as training calls it, which also returns
what the recorder then need not measure, right for gradients whose squares underflow.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from pgt_diag.allocator import keep_freed_memory
from pgt_diag.bench import (
    LOSS_SHAPE,
    Spread,
    alternate,
    clipping_parts,
    loss_part,
    pgt_loss,
    ratio,
    repeated,
    training_step,
)
from pgt_diag.clipping import agc_parameters, clip_filters_
from pgt_diag.config import RunConfig
from pgt_diag.models import build_model
from pgt_diag.step import build_optimizer


class Storages(TorchDispatchMode):
    """Knows how many bytes of tensors made under it are alive, and were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        self.most = max(self.most, self.alive())
        return result

    def alive(self) -> int:
        return sum(size for storage, size in self.made.items() if not storage.expired())


def memory(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> list[int]:
    """Return the bytes kept for backward, and the most that were alive at once."""
    with Storages() as storages:
        value = loss(logits, target)
        kept = storages.alive() - value.untyped_storage().nbytes()
        torch.autograd.grad(value, logits)
    return [kept, storages.most]


def rounded(spread: Spread) -> list[float]:
    return [round(value, 3) for value in asdict(spread).values()]


def clock() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def measure_loss(seconds: float) -> dict[str, Any]:
    logits = torch.randn(LOSS_SHAPE, requires_grad=True)
    target = torch.randint(LOSS_SHAPE[1], LOSS_SHAPE[:1])
    losses = {"ours": pgt_loss, "cross_entropy": F.cross_entropy}
    _, count = repeated(loss_part(F.cross_entropy, logits, target), 0.05)
    blocks = {}
    for name, loss in losses.items():
        once = loss_part(loss, logits, target)
        blocks[name] = lambda once=once: [once() for _ in range(count)]
    spent = alternate(blocks, seconds=seconds, clock=clock())
    return {
        "pairs": len(spent["ours"]),
        "ms": {name: round(1e3 * Spread.of(spent[name]).median / count, 3) for name in spent},
        "least_ms": {name: round(1e3 * min(spent[name]) / count, 3) for name in spent},
        "ratio": rounded(ratio(spent, "ours", "cross_entropy")),
        "kept_and_peak_bytes": {n: memory(loss, logits, target) for n, loss in losses.items()},
    }


def measure_clipping(seconds: float) -> dict[str, Any]:
    model = build_model("resnet18", num_classes=10)
    images, target = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    step = training_step(model, build_optimizer(model, RunConfig(lr=1e-3)), images, target)
    step()
    blocks, counts = {"step": step}, {"step": 1}
    own_logits = torch.randn(128, 10, requires_grad=True)
    blocks["loss"], counts["loss"] = repeated(loss_part(pgt_loss, own_logits, target), 0.05)
    parameters = agc_parameters(model)
    parts = clipping_parts(model)
    parts["with norms"] = lambda: clip_filters_(parameters, clip_factor=0.01, eps=1e-3)
    for name, part in parts.items():
        blocks[name], counts[name] = repeated(part, 0.1)
    if "timm" not in blocks:
        sys.exit("timm is missing: python -m pip install timm")
    spent = alternate(blocks, seconds=seconds, clock=clock())
    once = {name: [each / counts[name] for each in spent[name]] for name in spent}
    return {
        "rounds": len(spent["step"]),
        "ms": {name: round(1e3 * Spread.of(once[name]).median, 2) for name in once},
        "times_faster_than_timm": rounded(ratio(once, "timm", "ours")),
        "with_norms_times_faster_than_timm": rounded(ratio(once, "timm", "with norms")),
        "share_of_step_percent": rounded(ratio(once, "ours", "step") * 100),
        "loss_share_of_step_percent": rounded(ratio(once, "loss", "step") * 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part", choices=("default", "own heap", "clipping"), help="one alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "clipping":
        print(json.dumps(measure_clipping(options.seconds)))
    elif options.part:
        if options.part == "own heap" and not keep_freed_memory():
            sys.exit("this C library has no such settings")
        print(json.dumps(measure_loss(options.seconds)))
    else:
        result: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads}
        for part in ("default", "own heap", "clipping"):
            # The allocator's settings are a process's own.
            arguments = [f"--seconds={options.seconds}", f"--threads={options.threads}"]
            arguments.append(f"--part={part}")
            done = subprocess.run(
                [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True
            )
            result[part] = json.loads(done.stdout)
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
