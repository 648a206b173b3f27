"""Every figure that takes a GPU, in one command of at most eight minutes.

    python tests/benchmarks/gpu.py --out gpu.json

Runs the other benchmarks and `pgt-diag bench` on the GPU, and the tests that need one, each as a
process of its own with a limit of its own; writes what each printed, and prints a short table. What
fails or takes too long is said, and the others go on.
Goals (issue 5): recording at most 1 % of a step at 224 px and batch 256, at most 3 % of a small one
captured as a CUDA graph; a step at least 1.3 times as fast as a torchvision-style loop's at 224 px,
2 times at 32 px; the PGT loss at most 1.05 times cross_entropy; AGC twice as fast as timm's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BENCH = ["-m", "pgt_diag", "bench", "--json", "--device=cuda"]
LARGE = ["--size=224", "--batch-size=256", "--seconds=6"]
SMALL = ["--size=32", "--batch-size=128", "--seconds=4"]
STEP = ["tests/benchmarks/training_step.py", "--device=cuda", "--workers=16"]
STEP += ["--loops", "reference", "ready"]
TESTS = ["clipping", "data", "data_decoding", "graph", "kernels", "loss_kernels", "training"]
PEERS = ["tests/benchmarks/peers.py", "--device=cuda", "--ways", "plain", "ours", "reading_loop"]
LOADING = ["tests/benchmarks/data_loading.py", "--device=cuda", "--workers=16", "--rounds=4"]
COMMANDS: dict[str, tuple[int, list[str]]] = {
    "32 px, small stem, graph": (60, [*BENCH, *SMALL, "--stem=small"]),
    "step at 32 px": (80, [*STEP, "--steps=20", "--rounds=8"]),
    "224 px, graph": (70, [*BENCH, *LARGE]),
    "step at 224 px": (90, [*STEP, "--size=224", "--batch=256", "--steps=2", "--rounds=6"]),
    "32 px, graph": (40, [*BENCH, *SMALL]),
    "224 px, eager": (60, [*BENCH, *LARGE, "--no-cuda-graph"]),
    "a loop that reads": (40, PEERS),
    # By name: others import what only reports need.
    "tests": (90, ["-m", "pytest", "-q", "-m", "gpu", *(f"tests/test_{t}.py" for t in TESTS)]),
    "image folder": (60, LOADING),
}
"""What is run, by name: a limit in seconds, and Python's arguments."""
LIMIT = 480.0


def run(limit: float, arguments: list[str]) -> dict[str, Any]:
    """Run Python; return its seconds, and the JSON object or the end of the text it printed."""
    began = time.monotonic()
    # cuBLAS reads its setting once: deterministic runs come after others in the tests.
    settings = {"PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        told = (error.stdout or b"")[-2000:].decode(errors="replace")
        return {"seconds": round(limit, 1), "failed": "took too long", "text": told}
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if done.returncode:
        result["failed"] = (done.stderr + done.stdout)[-2000:]
    try:
        result["result"] = json.loads(done.stdout)
    except ValueError:
        result["text"] = done.stdout[-2000:]
    return result


def row(name: str, outcome: dict[str, Any]) -> str:
    """Return a line for people."""
    found = outcome.get("result", {})
    if "failed" in outcome:
        text = "failed: " + " ".join(outcome["failed"].split())[-150:]
    elif "recording" in found:
        overhead = found["recording"]["overhead_percent"]
        text = (
            f"recording {overhead['median']:.2f} % ({overhead['low']:.2f} to {overhead['high']:.2f}"
            f"), step {found['recording']['recorded_ms']['median']:.3f} ms, "
            f"{found['rate']['images_per_second']:,.0f} images/s, "
            f"{found['roofline']['share_percent']:.0f} % of the matrix products' rate, loss "
            f"{found['loss']['ratio_to_cross_entropy']['median']:.2f}×, AGC "
            f"{found['agc']['ms']['median']:.2f} ms"
        )
    elif "times_ready" in found:
        times = ", ".join(f"{key[6:]} {found[key][0]}×" for key in found if key[:6] == "times_")
        text = f"{found['images_per_second']:,.0f} images/s; {times} as long as ours"
    else:
        text = json.dumps(found) if found else outcome.get("text", "").strip().rpartition("\n")[2]
    return f"{name:26}{outcome['seconds']:6.1f} s  {text[:300]}"


def main() -> None:
    """Run all, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    end = time.monotonic() + LIMIT
    outcomes: dict[str, Any] = {}
    for name in options.only:
        limit, arguments = COMMANDS[name]
        left = end - time.monotonic()
        outcomes[name] = (
            run(min(limit, left), arguments)
            if left > 5
            else {"seconds": 0.0, "failed": "no time was left"}
        )
        options.out.write_text(json.dumps(outcomes, indent=2))
        print(row(name, outcomes[name]), flush=True)
    if any("failed" in outcome for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
