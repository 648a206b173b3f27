"""The GPU's kernels: computed by Triton's interpreter, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pgt_diag import reductions

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")

ROOT = Path(__file__).parent.parent
CHECK = """
import itertools

import torch
from pgt_diag import kernels

torch.manual_seed(0)
near = {"rtol": 1e-5, "atol": 1e-6}
assert kernels._work(torch.device("cpu"))

shapes = [(4, 3, 7, 7), (6, 1, 1, 1), (1, 5, 3, 3), (3, 2000)]
shapes += 31 * [(2, 9)] + 31 * [(3, 16)] + [(2, 3, 2, 2, 2)]
weights = [torch.randn(shape) * 10.0 ** (-index % 40) for index, shape in enumerate(shapes)]
weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
weights[3][1] = 0
weights[3][2] = 1e-42
weights[5][0], weights[6][0], weights[6][1] = 1e30, 3e38, torch.inf
row = torch.full((sum(map(len, weights)) + 2,), -1.0)
outs = row[1:-1].split([len(weight) for weight in weights])
kernels.write_filter_norms(weights, outs)
for weight, out in zip(weights, outs):
    expected = torch.stack([each.double().square().sum().sqrt() for each in weight])
    held = expected.clamp(max=torch.finfo(torch.float32).max)  # what is finite stays finite
    expected = torch.where(expected.isinf(), expected, held).float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-45)
assert row[0] == row[-1] == -1 and outs[3][1] == 0 and outs[3][2] > 0
one = torch.empty(4)
kernels.write_filter_norms(weights[:1], [one])
assert torch.equal(one, outs[0])
assert not kernels.is_dense(torch.randn(6, 8)[:, ::2]) and kernels.is_dense(weights[0])

for shape in [(3, 5, 4, 4), (40, 130, 1, 1), (1, 3, 9), (2, 4, 3, 2, 2), (9, 1, 5, 5)]:
    kernels.maps._PROGRAMS = 1 if shape[0] == 40 else 256  # a program reads several blocks
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for last in (False, True):
            for positive in (False, True):
                values = torch.zeros(shape, dtype=dtype)
                place = [int(torch.randint(size, ())) for size in shape]
                values[tuple(place)] = 2e-7
                place[1] = (place[1] + 1) % shape[1]
                values[tuple(place)] = torch.nan if shape[1] > 1 else 1
                values[:, -1] -= float(shape[1] > 2)
                if last and len(shape) == 4:
                    values = values.contiguous(memory_format=torch.channels_last)
                told = (shape, dtype, last, positive)
                actives = torch.zeros(2, shape[1]).unbind()
                assert kernels.mark_active(values, actives, positive=positive)
                wanted = (~(values <= 0) if positive else values != 0).transpose(0, 1).flatten(1)
                assert all(torch.equal(each, wanted.any(1).float()) for each in actives), told
                seen = torch.randn(shape, dtype=dtype)
                if last and len(shape) == 4:
                    seen = seen.contiguous(memory_format=torch.channels_last)
                squares = torch.ones(shape[1])
                assert kernels.add_gap(seen, squares, positive=positive)
                means = seen.relu() if positive else seen
                means = means.double().flatten(2).mean(2)
                torch.testing.assert_close(squares.double(), 1 + means.square().sum(0), **near)
                if positive or not kernels.takes_relu(values):
                    continue
                for inplace, agree in ((False, None), (True, False), (True, True)):
                    actives = torch.zeros(2, shape[1]).unbind()
                    result = values.clone() if inplace else torch.full_like(values, 7)
                    kernels.write_relu(result if inplace else values, result, actives, agree=agree)
                    wanted = values.relu()
                    torch.testing.assert_close(result, wanted, equal_nan=True, rtol=0, atol=0)
                    wanted = (wanted != 0).transpose(0, 1).flatten(1).any(1).float()
                    assert all(torch.equal(each, wanted) for each in actives), told
strided = torch.zeros(2, 3, 8, 8)[:, :, ::2, 1::3]
assert not kernels.mark_active(strided, [torch.zeros(3)], positive=False)
assert not kernels.add_gap(strided, torch.zeros(3), positive=False)
first = torch.zeros(2, 3, 8, 8)
assert not kernels.takes_relu(first)
last = first.contiguous(memory_format=torch.channels_last)
assert kernels.takes_relu(last) and not kernels.takes_relu(last[:1])
assert not kernels.takes_relu(last.double()) and not kernels.takes_relu(last[:0].clone())

for nesterov, pointer, skip in itertools.product((True, False), (True, False), (None, 0.0, 1.0)):
    shapes = [(4, 3, 7, 7), (6, 16, 3, 3), (3, 2000), (1, 10), (5, 64)]
    twins = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    updates = [
        kernels.Update(one.detach().clone(), one, torch.zeros_like(one), *torch.empty(2, len(one)))
        for one in twins
    ]
    settings = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": nesterov}
    optimizer = torch.optim.SGD(twins, lr=0.1, **settings)
    for _ in range(3):
        gradients = [torch.randn_like(one) for one in twins]
        updates = [one._replace(gradient=each) for one, each in zip(updates, gradients)]
        for twin, gradient in zip(twins, gradients):
            twin.grad = gradient.clone()
        if skip != 1:
            optimizer.step()
        lr = torch.tensor(0.1) if pointer else 0.1
        kernels.step_sgd(updates, lr, None if skip is None else torch.tensor(skip), **settings)
        for twin, one in zip(twins, updates):
            torch.testing.assert_close(one.weight, twin.detach(), rtol=1e-6, atol=1e-6)
            for values, norms in (one[1::2], one[::4]):
                wanted = values.double().flatten(1).norm(dim=1)
                torch.testing.assert_close(norms.double(), wanted, rtol=1e-6, atol=0)
"""


LOSSES = """
import itertools

import torch
import torch.nn.functional as F
from pgt_diag import kernels

torch.manual_seed(0)
near, rough = {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-2, "atol": 1e-3}
for (rows, classes), dtype, alpha, smoothing, reduction in itertools.product(
    [(7, 10), (3, 2500), (4, 1)], [torch.float32, torch.bfloat16], [0.0, 0.25, 1.0], [0.0, 0.1],
    ["mean", "sum", "none"],
):
    logits = (torch.randn(rows, classes + 3) * 5).to(dtype)[:, :classes]
    if smoothing == 0 and classes > 5:
        logits[1, : classes - 3] = -torch.inf
    target = torch.randint(classes, (rows,))
    target[1], target[-1] = classes - 1, -100
    grad_loss = torch.randn(rows) if reduction == "none" else torch.randn(())
    named = {"alpha": alpha, "smoothing": smoothing, "ignore_index": -100, "reduction": reduction}
    loss, kept = kernels.write_losses(logits, target, **named)
    gradient = kernels.write_gradient(logits, target, kept, grad_loss, **named)
    z, counted = logits.double(), target != -100
    wanted = F.cross_entropy(z, target, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    q = torch.full_like(z, smoothing / classes)
    q[counted, target[counted]] += 1 - smoothing
    powered = (torch.zeros_like(z) if alpha == 0 else alpha * z).softmax(1)
    scale = grad_loss / (counted.sum() if reduction == "mean" else 1)
    wanted = (powered - q) * counted[:, None] * scale.reshape(-1, 1)
    told = near if dtype == torch.float32 else rough
    torch.testing.assert_close(gradient.double(), wanted, **told, check_dtype=False)
logits, target = torch.randn(3, 5), torch.tensor([1, 9, -1])
named = {"alpha": 0.25, "smoothing": 0.0, "ignore_index": -100}
loss, _ = kernels.write_losses(logits, target, **named, reduction="none")
assert loss.isnan().tolist() == [False, True, True], "what is no class is seen, not read"
target[:] = -100
loss, kept = kernels.write_losses(logits, target, **named, reduction="mean")
gradient = kernels.write_gradient(logits, target, kept, torch.ones(()), **named, reduction="mean")
assert loss.isnan() and (gradient == 0).all()
"""


@pytest.mark.skipif(
    triton.__version__.startswith("3.6."), reason="its interpreter cannot loop with this NumPy"
)
@pytest.mark.parametrize("check", [CHECK, LOSSES], ids=["recorder", "loss"])
def test_the_interpreter_finds_what_plain_loops_find(check: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


STRIDES = ("image_stride", "channel_stride", "pixel_stride")
SHAPE = ("images", "channels", "pixels")
MAP = {"values": "*bf16", **dict.fromkeys((*SHAPE, *STRIDES), "i32")}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "norms": (
        {
            "rows": ("*fp32",) * 3,
            "outs": ("*fp32",) * 3,
            "firsts": ("i32",) * 4,
            "lengths": ("i32",) * 3,
            "fans": ("i32",) * 3,
        },
        {"aligned": 2, "count": 3, "together": 2, "block": 1024},
    ),
    "sgd": (
        dict.fromkeys(
            ("weights", "gradients", "momenta", "gradient_outs", "weight_outs"), ("*fp32",) * 3
        )
        | {"firsts": ("i32",) * 4, "fans": ("i32",) * 3, "lr": "*fp32", "skip": "*fp32"}
        | {"beta": "fp32", "decay": "fp32"},
        {"lr_is_pointer": True, "may_skip": True, "nesterov": True}
        | {"aligned": 2, "count": 3, "block": 1024},
    ),
    "losses": (
        {"logits": "*bf16", "target": "*i64", "losses": "*fp32", "normalizers": "*fp32"}
        | dict.fromkeys(("classes", "row_stride", "target_stride", "ignore_index"), "i32")
        | {"alpha": "fp32", "smoothing": "fp32"},
        {"smooth": True, "block": 1024},
    ),
    "reduce": (
        {"losses": "*fp32", "target": "*i64", "loss": "*fp32", "divisor": "*fp32"}
        | dict.fromkeys(("rows", "target_stride", "ignore_index"), "i32"),
        {"mean": True, "block": 1024},
    ),
    "gradient": (
        {"logits": "*bf16", "target": "*i64", "normalizers": "*fp32", "divisor": "*fp32"}
        | {"grad_loss": "*fp32", "gradient": "*bf16", "alpha": "fp32", "smoothing": "fp32"}
        | dict.fromkeys(("classes", "row_stride", "target_stride", "ignore_index"), "i32")
        | {"grad_stride": "i32"},
        {"mean": True, "block": 1024},
    ),
    "total": (
        {"norms": "*fp32", "count": "i32", "others": "*fp32", "other_count": "i32", "out": "*fp32"},
        {"block": 2048},
    ),
    "relu, large": (
        {"values": "*bf16", "results": "*bf16", "actives": ("*fp32",), "rows": "i32"}
        | {"channels": "i32"},
        {"count": 1, "blocks": 4, "agree": True, "row_block": 64, "channel_block": 64},
    ),
    "relu": (
        {"values": "*bf16", "results": "*bf16", "actives": ("*fp32",) * 2, "rows": "i32"}
        | {"channels": "i32"},
        {"count": 2, "blocks": 8, "agree": False, "row_block": 32, "channel_block": 64},
    ),
    "active": (
        {**MAP, "actives": ("*fp32",)},
        {"count": 1, "positive": True, "blocks": 4, "row_block": 32, "channel_block": 64}
        | {"channel_stride": 1},
    ),
    "active, channels first": (
        {**MAP, "actives": ("*fp32",)},
        {"count": 1, "positive": False, "blocks": 1, "row_block": 512, "channel_block": 4}
        | {"pixel_stride": 1},
    ),
    "means": (
        {key: MAP[key] for key in MAP if key != "images"} | {"means": "*fp32"},
        {"positive": True, "pixel_block": 16, "channel_block": 64, "channel_stride": 1},
    ),
    "squares": (
        {"means": "*fp32", "squares": "*fp32", "images": "i32", "channels": "i32"},
        {"image_block": 64, "channel_block": 16},
    ),
    "keep": (
        {"row": "*fp32", "blank": "*fp32", "kept": "*fp32", "width": "i32"},
        {"block": 1024},
    ),
}
"""Signatures and constants by kernel; Triton takes an argument that is 1 for a constant."""


def kernel_of(case: str) -> Any:
    from pgt_diag.kernels import loss, maps, norms, sgd

    name = f"{case.partition(',')[0]}_kernel"
    return next(
        getattr(module, name) for module in (loss, maps, norms, sgd) if hasattr(module, name)
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_gpus(
    case: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = kernel_of(case)
    signature, constants = CASES[case]
    signature = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cubin" in compiled.asm


@pytest.mark.parametrize("case", ["norms", "relu", "relu, large", "sgd"])
def test_memory_is_read_16_bytes_at_a_time(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = kernel_of(case)
    signature, constants = CASES[case]
    # What Triton finds out at a call: which arguments are multiples of 16.
    multiples = [(name,) for name in ("values", "results", "channels")]
    if not case.startswith("relu"):
        names = ("rows", "weights", "gradients", "momenta", "fans")
        multiples = [(name, index) for name in names for index in (0, 1) if name in signature]
    attributes = {
        (function.arg_names.index(name), *index): [["tt.divisibility", 16]]
        for name, *index in multiples
    }
    source = ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=attributes,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ld.global.v4.b32" in compiled.asm["ptx"]


def test_without_a_gpu_there_are_no_kernels() -> None:
    assert reductions.working_kernels(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_work_on_this_gpu() -> None:
    from pgt_diag import kernels

    assert kernels._work(torch.device("cuda"))
