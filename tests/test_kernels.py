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
import torch
from pgt_diag import kernels

torch.manual_seed(0)
assert kernels._works(torch.device("cpu"))

shapes = [(4, 3, 7, 7), (6, 1, 1, 1), (1, 5, 3, 3), (3, 2000)] + 31 * [(2, 9)] + [(2, 3, 2, 2, 2)]
weights = [torch.randn(shape) * 10.0 ** (-index % 40) for index, shape in enumerate(shapes)]
weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
weights[3][1] = 0
weights[3][2] = 1e-42
row = torch.full((sum(map(len, weights)) + 2,), -1.0)
outs = row[1:-1].split([len(weight) for weight in weights])
kernels.write_filter_norms(weights, outs)
for weight, out in zip(weights, outs):
    expected = torch.tensor([float(each.double().square().sum().sqrt()) for each in weight])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-45)
assert row[0] == row[-1] == -1 and outs[3][1] == 0 and outs[3][2] > 0
one = torch.empty(4)
kernels.write_filter_norms(weights[:1], [one])
assert torch.equal(one, outs[0])
assert not kernels.is_dense(torch.randn(6, 8)[:, ::2]) and kernels.is_dense(weights[0])

for shape in [(3, 5, 4, 4), (40, 130, 1, 1), (1, 3, 9), (2, 4, 3, 2, 2), (9, 1, 5, 5)]:
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
                active = torch.full((shape[1],), 0.0)
                assert kernels.mark_active(values, active, positive=positive)
                wanted = (~(values <= 0) if positive else values != 0).transpose(0, 1).flatten(1)
                assert torch.equal(active, wanted.any(1).float()), (shape, dtype, last, positive)
strided = torch.zeros(2, 3, 8, 8)[:, :, ::2, 1::3]
assert not kernels.mark_active(strided, torch.zeros(3), positive=False)
"""


def test_the_interpreter_finds_what_plain_loops_find() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


STRIDES = ("image_stride", "channel_stride", "pixel_stride")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", ["norms", "active, channels last", "active, channels first"])
def test_kernels_compile_for_gpus(
    case: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pgt_diag import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature: dict[str, Any]
    constants: dict[str, Any]
    if case == "norms":
        function, constants = kernels.norms_kernel, {"count": 3, "block": 1024}
        signature = {
            "rows": ("*fp32",) * 3,
            "outs": ("*fp32",) * 3,
            "firsts": ("i32",) * 3,
            "fans": ("i32",) * 3,
        }
    else:
        function = kernels.active_kernel
        # Triton takes an argument that is 1 for a constant.
        one = "channel_stride" if case.endswith("last") else "pixel_stride"
        constants = {
            "positive": case.endswith("last"),
            "row_block": 32,
            "channel_block": 64,
            one: 1,
        }
        signature = {"values": "*bf16", "active": "*fp32"}
        signature |= dict.fromkeys(("images", "channels", "pixels", *STRIDES), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cubin" in compiled.asm


def test_without_a_gpu_there_are_no_kernels() -> None:
    assert reductions.working_kernels(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_work_on_this_gpu() -> None:
    from pgt_diag import kernels

    assert kernels._works(torch.device("cuda"))
