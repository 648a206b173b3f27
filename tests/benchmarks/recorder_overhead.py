"""What recording costs: the same training step with and without a recorder, in turn.

    python tests/benchmarks/recorder_overhead.py [--device cuda] [--size 224 --batch 256]
    python tests/benchmarks/recorder_overhead.py --size 8 --stem small --batch 64    # preset smoke

Prints one JSON object. A pair is a block of steps of each of two identical networks, in alternating
order; the overhead is the median over pairs of (recorded / plain − 1). A block is long enough for
the writer thread to encode and flush within it, so what it takes from training counts; what is
left to write at the end of a block is written before the next, untimed.

`--only weights-and-silence` measures neither the gradients' norms nor the GAP features; the trace,
which the writer encodes as ever, has them as unknown. Goals (issue 5): at most 3 % of a step for
everything, 2 % for weight norms and silence alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import pgt_diag
from pgt_diag.activations import Call, Tap
from pgt_diag.config import Stem
from pgt_diag.models import build_model

LEFT_OUT = ["norms of the filters' gradients", "GAP features"]


def build(device: torch.device, stem: Stem) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, stem=stem).to(device)
    settings = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
    return model, torch.optim.SGD(model.parameters(), **settings)


class WeightsAndSilence(pgt_diag.FilterRecorder):
    """A recorder without what is in LEFT_OUT, but for the first iteration's GAP features."""

    def begin(self, taps: dict[str, tuple[Tap, ...]], gap_tap: Tap, gap_features: int) -> None:
        """Have no later map read for GAP features: none is where they are said to be now."""
        super().begin(taps, gap_tap, gap_features)
        self._observer._gap_tap = Tap(Call("nowhere", 0, "output"), "sum")
        self._unknown = {
            name: weight.new_full((len(weight),), torch.nan)
            for name, weight in self.convolution_weights
        }

    def leave_gradients_out(self) -> None:
        """Tell norms, as a loop may that has computed them: then they are not computed."""
        self.log(gradient_norms=self._unknown)


def check_what_was_measured(run: pgt_diag.Run, everything: bool) -> None:
    """End with an error unless a measured run has all that it should, and nothing left out."""
    left_out = [run.gradient_norms(layer.name) for layer in run.layers]
    left_out.append(run.gap_norms().iloc[1:])
    measured = [run.weight_norms(layer.name) for layer in run.layers]
    measured.append(run.state_counts("silent"))
    if everything:
        measured += left_out
    else:
        assert all(table.isna().all(axis=None) for table in left_out)
    assert all(table.notna().all(axis=None) for table in measured)


def stepper(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    target: torch.Tensor,
    steps: int,
    before_step: Callable[[], None] = lambda: None,
) -> Callable[[], float]:
    def block() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
                loss = F.cross_entropy(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            before_step()
            optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=32, help="image size, pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--stem", type=Stem, choices=list(Stem), default=Stem.IMAGENET)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=5, help="steps in a block")
    parser.add_argument("--only", choices=("weights-and-silence",))
    options = parser.parse_args()
    device = torch.device(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    target = torch.randint(10, (options.batch,), device=device)

    plain = stepper(*build(device, options.stem), images, target, options.steps)
    model, optimizer = build(device, options.stem)
    with tempfile.TemporaryDirectory() as folder:
        path, told = Path(folder) / "run", []
        if options.only:
            recorder = WeightsAndSilence(model, path, optimizer=optimizer)
            told = [recorder.leave_gradients_out]
        else:
            recorder = pgt_diag.FilterRecorder(model, path, optimizer=optimizer)
        with recorder:
            recorded = stepper(model, optimizer, images, target, options.steps, *told)
            for _ in range(2):
                plain(), recorded()
            pairs = []
            for index in range(options.pairs):
                order = (plain, recorded) if index % 2 else (recorded, plain)
                seconds = {}
                for block in order:
                    recorder.flush()
                    seconds[block] = block()
                pairs.append((seconds[plain], seconds[recorded]))
        check_what_was_measured(pgt_diag.load_run(path), everything=not options.only)
    ratios = sorted(recorded / plain - 1 for plain, recorded in pairs)
    quarter = len(ratios) // 4
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "size": options.size,
        "stem": options.stem,
        "batch": options.batch,
        "pairs": options.pairs,
        "left_out": LEFT_OUT if options.only else [],
        "steps_per_block": options.steps,
        "plain_step_ms": round(
            1e3 * statistics.median(plain for plain, _ in pairs) / options.steps, 2
        ),
        "overhead_percent": round(100 * statistics.median(ratios), 2),
        "overhead_percent_quartiles": [
            round(100 * ratios[quarter], 2),
            round(100 * ratios[-1 - quarter], 2),
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
