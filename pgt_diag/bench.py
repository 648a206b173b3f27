"""How fast this machine trains and records: what `pgt-diag bench` measures.

Every comparison alternates blocks of the things compared within one process, and is told with its
quartiles: other load on the machine disturbs both sides of a pair, and widens the quartiles.
"""

import copy
import importlib
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgt_diag.activations import convolutions
from pgt_diag.allocator import keep_freed_memory
from pgt_diag.clipping import adaptive_clip_grad_, agc_parameters
from pgt_diag.config import RunConfig, Stem
from pgt_diag.cost import flops_per_image
from pgt_diag.encoder import (
    SCALARS,
    Block,
    LayerSlices,
    TraceEncoder,
    default_record_every,
    layer_slices,
)
from pgt_diag.errors import ConfigurationError
from pgt_diag.filters import COLLAPSED_RATIO, ZEROED_RATIO
from pgt_diag.graph import WARM_UP, CudaCapture, GraphedStep
from pgt_diag.machine import busy_cpus
from pgt_diag.models import build_model
from pgt_diag.powergrad import power_grad_cross_entropy
from pgt_diag.recorder import FilterRecorder
from pgt_diag.step import build_optimizer
from pgt_diag.training import environment, set_threads

LOSS_SHAPE = (1024, 1000)
"""Examples and classes at which the losses are compared: ImageNet's, at the paper's batch."""
_CLASSES = 10
_BLOCK_SECONDS = 0.5
"""Long enough for the writer thread to hand over and encode within each block."""
_LEAST_ROUNDS = 3
_MATMUL_SIZES = {"cpu": 2048, "cuda": 8192}
_RUN_ITERATIONS = 500_000
"""The length of the run whose trace is measured: the paper's 100 epochs of ImageNet at 256."""
_TRACE_ITERATIONS = 4096
_TRACE_FLUSH = 1024
_TRACE_BLOCK = 32

Part = Callable[[], object]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))

    def __mul__(self, factor: float) -> "Spread":
        """Return it in another unit; `factor` is positive."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


def alternate(
    parts: Mapping[str, Part],
    *,
    seconds: float = 0.0,
    rounds: int = _LEAST_ROUNDS,
    between: Part = lambda: None,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each part once a round, in reversed order every second round.

    Goes on for at least `rounds` rounds and `seconds` seconds. `between` runs before each part,
    untimed. On CUDA a part's time ends when the device has done its work. `clock` is wall-clock
    time unless told otherwise: `time.thread_time` leaves out what other processes take, where one
    thread does all the work. Returns the seconds of every part, by round.
    """
    device = torch.device(device)
    spent: dict[str, list[float]] = {name: [] for name in parts}
    end = time.perf_counter() + seconds
    for index in itertools.count():
        if index >= rounds and time.perf_counter() >= end:
            return spent
        for name in list(parts)[:: -1 if index % 2 else 1]:
            between()
            _wait(device)
            began = clock()
            parts[name]()
            _wait(device)
            spent[name].append(clock() - began)
    raise AssertionError


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(spent: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Return how many times the seconds of `to` those of `name` are, round by round."""
    return Spread.of([a / b for a, b in zip(spent[name], spent[to], strict=True)])


def repeated(part: Part, seconds: float, device: torch.device | str = "cpu") -> tuple[Part, int]:
    """Return a block that repeats `part` for about so long, and how often it does."""
    # The first call sets up what later ones use: threads, memory, kernels.
    alternate({"it": part}, rounds=1, device=device)
    once = min(alternate({"it": part}, rounds=2, device=device)["it"])
    count = max(1, round(seconds / max(once, 1e-6)))

    def block() -> None:
        for _ in range(count):
            part()

    return block, count


def matmul_rate(device: torch.device, seconds: float) -> float:
    """Return the best rate of large matrix products, FLOP/s: float32 on CPU, bf16 on CUDA."""
    size = _MATMUL_SIZES.get(device.type, 2048)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty_like(one)
    spent = alternate(
        {"product": lambda: torch.mm(one, one, out=product)},
        seconds=seconds,
        rounds=5,
        device=device,
    )
    return 2 * size**3 / min(spent["product"])


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor
) -> Part:
    """Return one iteration as `pgt-diag train` makes it, without data and metrics."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            loss = F.cross_entropy(model(images), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def loss_part(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Part:
    """Return a loss's forward and backward pass; logits (N, C) require a gradient."""
    return lambda: torch.autograd.grad(loss(logits, target), logits)


def pgt_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the PGT loss at the paper's α, 0.25."""
    return power_grad_cross_entropy(logits, target, alpha=0.25)


def clipping_parts(model: nn.Module) -> dict[str, Part]:
    """Return AGC's ways to clip the model's gradients: ours, and timm's where it is installed.

    Gradients must be there; both treat the same parameters. They are clipped again and again,
    which takes as long as the first time.
    """
    parameters = agc_parameters(model)
    parts: dict[str, Part] = {"ours": lambda: adaptive_clip_grad_(parameters)}
    if importlib.util.find_spec("timm") is not None:
        timm = importlib.import_module("timm.utils")
        parts["timm"] = lambda: timm.adaptive_clip_grad(parameters)
    return parts


def trace_cost(model: nn.Module, folder: Path) -> tuple[float, float]:
    """Return (bytes stored, µs of CPU time to encode) per iteration.

    On made-up norms of the model's filters, thinned as in a run of 500,000 iterations.
    """
    layers = convolutions(model)
    slices = layer_slices(list(layers), [layer.out_channels for layer in layers.values()])
    blocks = list(_made_up_blocks(slices, model))
    encoder = TraceEncoder(
        folder,
        slices,
        blocks[0].weight_norms[0],
        record_every=default_record_every(_RUN_ITERATIONS),
        ratios=(COLLAPSED_RATIO, ZEROED_RATIO),
    )
    began = time.process_time()
    for block in itertools.islice(itertools.cycle(blocks), _TRACE_ITERATIONS // _TRACE_BLOCK):
        encoder.add(block)
        if encoder.iterations % _TRACE_FLUSH == 0:
            encoder.flush()
    encoder.seal(complete=True)
    spent = time.process_time() - began
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return size / _TRACE_ITERATIONS, 1e6 * spent / _TRACE_ITERATIONS


def _made_up_blocks(slices: LayerSlices, model: nn.Module) -> Iterator[Block]:
    """Yield smooth weight norms and noisy gradient norms, as training makes them."""
    random = np.random.default_rng(0)
    filters = slices.offsets[-1]
    weights = random.uniform(0.8, 1.4, filters).astype(np.float32)
    for _ in range(8):
        size = (_TRACE_BLOCK, filters)
        noise = random.lognormal(0, 0.4, size).astype(np.float32)
        yield Block(
            weight_norms=weights + np.float32(1e-4) * noise,
            gradient_norms=np.float32(0.01) * noise,
            clip_factors=np.full(size, np.nan, np.float32),
            activity=noise,
            gap=noise[:, : min(filters, 512)],
            scalars=noise[:, : len(SCALARS)].copy(),
            skipped=np.zeros(_TRACE_BLOCK, bool),
        )


def bench(
    *,
    device: torch.device,
    model_name: str = "resnet18",
    stem: Stem = Stem.IMAGENET,
    image_size: int = 32,
    batch_size: int = 128,
    seconds: float = 20.0,
    graph: bool = True,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Measure this machine; return plain JSON values, times in the units that the keys name.

    seconds: for how long the training step is measured with and without recording; the rest takes
    about as long again. graph: on CUDA, measure the step as a captured graph, as training makes it
    on one GPU. report: told what is measured next.

    Raises ConfigurationError for a model that is unknown or takes no such images.
    """
    set_threads(None)
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(model_name, num_classes=_CLASSES, stem=stem)
    try:
        flops = flops_per_image(model, image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{model_name} cannot train on images of {image_size}×{image_size}: {reason}"
        ) from None
    if not convolutions(model):
        raise ConfigurationError(f"{model_name} has no convolution to record")
    try:
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    except RuntimeError as error:
        raise ConfigurationError(
            f"batch_size is {batch_size}, and memory does not hold so many images of "
            f"{image_size}×{image_size}"
        ) from error
    target = torch.randint(_CLASSES, (batch_size,), device=device)
    model.to(device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)

    graph = graph and device.type == "cuda"
    busy = busy_cpus()
    report("matrix products")
    rate = matmul_rate(device, seconds / 20)
    report("the training step, with and without recording")
    with tempfile.TemporaryDirectory(prefix="pgt-diag-bench-") as folder:
        step = _measure_steps(model, images, target, seconds, Path(folder) / "run", graph=graph)
    report("the PGT loss and cross-entropy")
    losses = _measure_losses(device, seconds / 5, graph=graph)
    report("adaptive gradient clipping")
    clipping = _measure_clipping(model, device, seconds / 5)
    report("the trace")
    with tempfile.TemporaryDirectory(prefix="pgt-diag-bench-") as folder:
        stored, encoding = trace_cost(model, Path(folder))
    images_per_second = batch_size / step["recorded_ms"]["median"] * 1e3
    return {
        "machine": {**environment(device), "busy_cpus_before": busy},
        "settings": {
            "model": model_name,
            "stem": stem.value,
            "size": image_size,
            "batch_size": batch_size,
            "seconds": seconds,
        },
        "recording": step,
        "rate": {
            "images_per_second": images_per_second,
            "iterations_per_second": images_per_second / batch_size,
        },
        "roofline": {
            "flops_per_image": flops,
            "matmul_flops_per_second": rate,
            "matmul_dtype": "bfloat16" if device.type == "cuda" else "float32",
            "share_percent": 100 * flops * images_per_second / rate,
        },
        "loss": losses,
        "agc": {
            **clipping,
            "share_of_step_percent": 100 * clipping["ms"]["median"] / step["plain_ms"]["median"],
        },
        "trace": {
            "bytes_per_iteration": stored,
            "encoding_us_per_iteration": encoding,
            "filters": sum(layer.out_channels for layer in convolutions(model).values()),
        },
    }


def _measure_steps(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    seconds: float,
    folder: Path,
    *,
    graph: bool,
) -> dict[str, Any]:
    """Time blocks of the training step with and without a recorder, on copies of the model."""
    device = images.device
    settings = RunConfig(lr=1e-3)
    plain_model, recorded_model = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    plain = training_step(plain_model, build_optimizer(plain_model, settings), images, target)
    optimizer = build_optimizer(recorded_model, settings)
    with FilterRecorder(recorded_model, folder, optimizer=optimizer) as recorder:
        recorded = training_step(recorded_model, optimizer, images, target)
        if graph:
            plain, recorded = captured(plain, device), captured(recorded, device, recorder.replayed)
        block_seconds = min(_BLOCK_SECONDS, seconds / (2 * _LEAST_ROUNDS))
        block, steps = repeated(plain, block_seconds, device)
        recorded()
        parts = {"plain": block, "recorded": lambda: [recorded() for _ in range(steps)]}
        # What is left to write at the end of a block must not burden the next one.
        spent = alternate(parts, seconds=seconds, between=recorder.flush, device=device)
    overhead = Spread.of(
        [100 * (a / b - 1) for a, b in zip(spent["recorded"], spent["plain"], strict=True)]
    )
    return {
        "overhead_percent": asdict(overhead),
        "captured": graph,
        "pairs": len(spent["plain"]),
        "steps_per_block": steps,
        "plain_ms": asdict(Spread.of(spent["plain"]) * (1e3 / steps)),
        "recorded_ms": asdict(Spread.of(spent["recorded"]) * (1e3 / steps)),
    }


def captured(step: Part, device: torch.device, replayed: Callable[[], None] = lambda: None) -> Part:
    """Return a step that has been captured as a CUDA graph.

    Raises ConfigurationError when it cannot be.
    """

    def iterate() -> Tensor:
        step()
        return torch.empty(0)

    def failed(reason: str) -> None:
        raise ConfigurationError(f"the step cannot be captured as a CUDA graph: {reason}")

    graphed = GraphedStep(iterate, CudaCapture(device), replayed=replayed, failed=failed)
    for _ in range(WARM_UP + 1):
        graphed()
    return graphed


def replayed(part: Part, times: int) -> Part:
    """Return a CUDA graph's replay that does `part` so many times: no launches in between."""
    part()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            part()
    return graph.replay


def _measure_losses(device: torch.device, seconds: float, *, graph: bool) -> dict[str, Any]:
    logits = torch.randn(LOSS_SHAPE, device=device, requires_grad=True)
    target = torch.randint(LOSS_SHAPE[1], LOSS_SHAPE[:1], device=device)
    once = {
        "ours": loss_part(pgt_loss, logits, target),
        "cross_entropy": loss_part(F.cross_entropy, logits, target),
    }
    passes = 20 if graph else 1
    if graph:
        once = {name: replayed(part, passes) for name, part in once.items()}
    theirs, count = repeated(once["cross_entropy"], seconds / 40, device)
    parts = {"ours": lambda: [once["ours"]() for _ in range(count)], "cross_entropy": theirs}
    parts["ours"]()
    spent = alternate(parts, seconds=seconds, device=device)
    return {
        "examples": LOSS_SHAPE[0],
        "classes": LOSS_SHAPE[1],
        "captured": graph,
        "ms": asdict(Spread.of(spent["ours"]) * (1e3 / count / passes)),
        "ratio_to_cross_entropy": asdict(ratio(spent, "ours", "cross_entropy")),
        "pairs": len(spent["ours"]),
    }


def _measure_clipping(model: nn.Module, device: torch.device, seconds: float) -> dict[str, Any]:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    blocks: dict[str, Part] = {}
    counts = {}
    for name, part in clipping_parts(model).items():
        blocks[name], counts[name] = repeated(part, seconds / 40, device)
    spent = alternate(blocks, seconds=seconds, device=device)
    once = {name: [each / counts[name] for each in spent[name]] for name in spent}
    timm = asdict(ratio(once, "timm", "ours")) if "timm" in once else None
    return {
        "ms": asdict(Spread.of(once["ours"]) * 1e3),
        "times_faster_than_timm": timm,
        "pairs": len(once["ours"]),
    }
