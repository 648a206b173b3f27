"""`pgt-diag bench`: how fast this machine trains and records."""

import json
import sys
from typing import Any

import typer

from pgt_diag.config import Device, RunConfig, Stem
from pgt_diag.machine import busy_note
from pgt_diag.preflight import check_model

DEFAULTS = RunConfig()
_NAMES = 11

EPILOG = """\b
Examples:
  pgt-diag bench                                     under a minute on two cores
  pgt-diag bench --device cuda --size 224 --batch-size 256
  pgt-diag bench --json | jq .recording.overhead_percent

Medians, with quartiles in brackets. Other load on the machine disturbs them: the wider the
quartiles, the less a number says.
"""


def bench(
    device: Device = typer.Option(DEFAULTS.device, help="What to measure."),
    model: str = typer.Option(DEFAULTS.model, help="Any torchvision model, or timm/NAME."),
    stem: Stem = typer.Option(DEFAULTS.stem, help="A ResNet's first layers."),
    size: int = typer.Option(32, min=1, help="Image size, pixels."),
    batch_size: int = typer.Option(128, min=1, help="Images per iteration."),
    seconds: float = typer.Option(
        20.0, min=0.1, max=3600, help="For the training step; the rest takes as long again."
    ),
    cuda_graph: bool = typer.Option(
        True, help="Measure the step captured as a CUDA graph, as training makes it on one GPU."
    ),
    json_output: bool = typer.Option(False, "--json", help="Print one JSON object instead."),
) -> None:
    """Measure what recording, the loss and the clipping cost on this machine."""
    check_model(model, stem)
    # Late, so that a mistyped name is answered before torch is loaded.
    from pgt_diag import bench as library
    from pgt_diag.distributed import resolve_device

    def report(what: str) -> None:
        if sys.stderr.isatty():
            print(f"measuring {what} …", file=sys.stderr, flush=True)

    result = library.bench(
        device=resolve_device(device),
        model_name=model,
        stem=stem,
        image_size=size,
        batch_size=batch_size,
        seconds=seconds,
        graph=cuda_graph,
        report=report,
    )
    if json_output:
        print(json.dumps(result, indent=2))
        return
    # Late: it imports rich.
    from commands.terminal import folded

    for name, text in _rows(result).items():
        print(folded(sys.stdout, text, name=name.ljust(_NAMES)))
    busy = busy_note(result["machine"]["busy_cpus_before"])
    warned = "Other load on this machine disturbs these: see the quartiles."
    print(folded(sys.stdout, f"{warned} When they began, {busy}." if busy else warned))


def _rows(result: dict[str, Any]) -> dict[str, str]:
    machine, settings, step = result["machine"], result["settings"], result["recording"]
    rate, roofline, loss = result["rate"], result["roofline"], result["loss"]
    agc, trace = result["agc"], result["trace"]
    timm = agc["times_faster_than_timm"]
    compared = f"; {_spread(timm, '.2f')} times faster than timm's" if timm else ""
    return {
        "machine": f"{machine['device']}, {machine['threads']} threads on "
        f"{machine['cpu_count']} CPUs, {machine['platform']}",
        "versions": f"pgt-diag {machine['pgt_diag']}, torch {machine['torch']}, torchvision "
        f"{machine['torchvision']}, numpy {machine['numpy']}, Python {machine['python']}",
        "network": f"{settings['model']} (stem {settings['stem']}) without normalisation, "
        f"{settings['size']} px, batch {settings['batch_size']}, "
        f"{roofline['flops_per_image'] / 1e9:.3g} GFLOP per image and step",
        "recording": f"{_spread(step['overhead_percent'], '.1f')} % more time per iteration, "
        f"{step['pairs']} pairs of {step['steps_per_block']} steps"
        + (", captured as a CUDA graph" if step["captured"] else ""),
        "rate": f"{rate['images_per_second']:,.4g} images/s, "
        f"{rate['iterations_per_second']:,.3g} iterations/s, recording on",
        "roofline": f"{roofline['share_percent']:.0f} % of the "
        f"{roofline['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s of {roofline['matmul_dtype']} "
        "matrix products",
        "PGT loss": f"{_spread(loss['ratio_to_cross_entropy'], '.2f')} times the time of "
        f"cross_entropy, {loss['ms']['median']:.3g} ms at "
        f"{loss['examples']:,} × {loss['classes']:,}",
        "AGC": f"{agc['ms']['median']:.3g} ms, {agc['share_of_step_percent']:.2g} % of the "
        f"step{compared}",
        "trace": f"{trace['bytes_per_iteration']:,.0f} bytes and "
        f"{trace['encoding_us_per_iteration']:,.0f} µs to encode per iteration, "
        f"{trace['filters']:,} filters",
    }


def _spread(spread: dict[str, float], form: str) -> str:
    low, high = (f"{spread[key]:{form}}" for key in ("low", "high"))
    return f"{spread['median']:{form}} ({low} to {high})"
