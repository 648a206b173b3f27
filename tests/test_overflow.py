"""Finite numbers whose squares no float32 holds: norms, totals and clipping are as in float64."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pgt_diag
from pgt_diag import clipping
from pgt_diag.clipping import clip_filters_, clip_global_norm_
from pgt_diag.reductions import filter_norms, write_total_norm
from tests.loops import batches, small_net

LARGEST = torch.finfo(torch.float32).max
SIZES = [0.0, 1e-42, 1e-20, 1.0, 1e18, 1e19, 1e25, 1e36]


def exact(rows: Tensor) -> list[float]:
    return [math.hypot(*row.double().flatten().tolist()) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_finite_filter_has_a_finite_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(len(SIZES), 3, 2, 2, generator=generator)
    weight = (weight * torch.tensor(SIZES).view(-1, 1, 1, 1)).to(dtype)
    norms = torch.empty(len(SIZES))
    filter_norms([weight], [norms])
    torch.testing.assert_close(norms.tolist(), exact(weight), rtol=1e-6, atol=1e-45)


def test_what_float32_cannot_hold_is_its_largest_or_least_number() -> None:
    rows = torch.tensor([[3e38, 3e38], [1e300, 0], [1e-300, 0], [0, 0], [math.inf, 1]]).double()
    rows[1, 0], rows[2, 0] = 1e300, 1e-300
    norms = torch.empty(5)
    filter_norms([rows], [norms])
    assert norms.tolist() == [LARGEST, LARGEST, 2.0**-149, 0, math.inf]
    filter_norms([torch.full((1, 4), 3e38)], [norms[:1]])
    assert norms[0] == LARGEST
    filter_norms([torch.tensor([[1e30, math.nan]])], [norms[:1]])
    assert norms[0].isnan()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_a_total_is_neither_lost_nor_infinite(size: float) -> None:
    norms, others, out = torch.full((3,), size), torch.full((1,), size), torch.empty(())
    write_total_norm(norms, others, out)
    assert float(out) == pytest.approx(2 * size, rel=1e-6)
    write_total_norm(norms, torch.full((1,), math.inf), out)
    assert float(out) == math.inf


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize(("clip_factor", "eps"), [(0.01, 1e-3), (1e-12, 1e-12), (2.0, 1e20)])
def test_clipping_scales_whatever_the_size(
    clip_factor: float, eps: float, as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_on_a_gpu:
        monkeypatch.setattr(clipping, "is_asynchronous", lambda _: True)
    generator = torch.Generator().manual_seed(0)
    weight, grad = (
        torch.randn(len(SIZES) ** 2, 3, 2, generator=generator) * torch.tensor(each).view(-1, 1, 1)
        for each in zip(*itertools.product(SIZES, SIZES), strict=True)
    )
    parameters = [torch.nn.Parameter(weight), *(torch.nn.Parameter(row[0]) for row in weight)]
    parameters[0].grad = grad.clone()
    for one, row in zip(parameters[1:], grad, strict=True):
        one.grad = row[0].clone()
    before = [[one.grad.clone()] if one.dim() == 1 else one.grad.clone() for one in parameters]
    factors, norms = clip_filters_(parameters, clip_factor, eps)
    for one, rows, factor, norm in zip(parameters, before, factors, norms, strict=True):
        weights = exact(one.detach() if one.dim() > 1 else [one.detach()])
        after = one.grad if one.dim() > 1 else [one.grad]
        for w, g, row, got, f, n in zip(
            weights, exact(rows), rows, after, factor, norm, strict=True
        ):
            limit = clip_factor * max(w, eps)
            wanted = limit / g if g > limit else 1.0
            torch.testing.assert_close(got.double(), row.double() * wanted, rtol=1e-5, atol=2e-45)
            assert float(f) == pytest.approx(wanted, rel=1e-5, abs=2e-45)
            if g * wanted > 1e-38:
                assert float(n) == pytest.approx(g * wanted, rel=1e-5)


def test_a_large_gradient_is_recorded_and_clipped_and_never_called_zero(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images, target = next(batches(1, side=14))
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        for clip in (False, True):
            optimizer.zero_grad()
            (F.cross_entropy(model(images), target) * 1e25).backward()
            expected = exact(model[2].weight.grad)
            total = math.hypot(*itertools.chain(*(exact(p.grad) for p in model.parameters())))
            if clip:
                factors, norms = clip_filters_(model[2].weight, 0.01, 1e-3)
                recorder.log(clip_factors={"2": factors[0]}, gradient_norms={"2": norms[0]})
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    found = run.gradient_norms("2").to_numpy()
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    limits = [0.01 * norm for norm in exact(model[2].weight.detach())]
    np.testing.assert_allclose(found[1], limits, rtol=1e-4)
    assert run.state_counts("zero_gradient")["2"].tolist() == [0, 0]
    assert run.iterations["grad_norm"].iloc[0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e19, 1e30, 3e38])
def test_gradients_of_any_size_are_clipped_to_the_global_norm(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 2), (4,), (5, 6)]
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    for each in parameters:
        each.grad = torch.rand(each.shape, generator=generator) * size
    before = [each.grad.double() for each in parameters]
    norm = math.hypot(*(value for each in before for value in each.flatten().tolist()))
    assert float(clip_global_norm_(parameters, 2.0)) == pytest.approx(norm, rel=1e-6)
    factor = min(1.0, 2.0 / (norm + 1e-6))
    for each, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(each.grad.double(), gradient * factor, rtol=1e-5, atol=1e-30)


def test_infinite_gradients_are_clipped_as_torch_does() -> None:
    ours, torchs = (torch.zeros(3, requires_grad=True) for _ in range(2))
    ours.grad, torchs.grad = (torch.tensor([1.0, math.inf, 2.0]) for _ in range(2))
    norm = torch.nn.utils.clip_grad_norm_([torchs], 2.0)
    assert torch.equal(clip_global_norm_([ours], 2.0).float(), norm)
    torch.testing.assert_close(ours.grad, torchs.grad, equal_nan=True)
