"""The PGT loss by a GPU's kernels: what the plain path computes, first and second derivatives."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgt_diag import powergrad
from pgt_diag.graph import CudaCapture
from pgt_diag.powergrad import power_grad_cross_entropy
from tests import plain_kernels

OPTIONS: list[dict[str, Any]] = [
    {"alpha": alpha, "label_smoothing": smoothing, "reduction": reduction}
    for alpha, smoothing, reduction in itertools.product(
        (0.0, 0.25, 0.9), (0.0, 0.1), ("mean", "sum", "none")
    )
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Have the CPU take plain kernels for those of a GPU; returns whether each loss was theirs."""
    took: list[bool] = []

    def fits(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
        took.append(weight is None and plain_kernels.takes_loss(logits, target))
        return took[-1]

    monkeypatch.setattr(powergrad, "working_kernels", lambda _: plain_kernels)
    monkeypatch.setattr(powergrad, "_fits_kernels", fits)
    yield took
    assert True in took, "the kernels' way was never taken"


def derivatives(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = power_grad_cross_entropy(leaf, target, **options)
    (first,) = torch.autograd.grad(loss.sum() * 3, leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.arange(leaf.shape[1])).sum(), leaf)
    (alone,) = torch.autograd.grad(
        power_grad_cross_entropy(leaf, target, **options).sum() * 3, leaf
    )
    torch.testing.assert_close(first, alone)
    return loss.detach(), alone, second


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first_and_second_derivatives_are_those_of_the_plain_path(
    options: dict[str, Any], taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, -100, 2, 2, 1])
    ours = derivatives(logits, target, **options)
    monkeypatch.setattr(powergrad, "_fits_kernels", lambda *_: False)
    for one, other in zip(ours, derivatives(logits, target, **options), strict=True):
        torch.testing.assert_close(one, other)


def test_class_weights_and_maps_take_the_plain_path(taken: list[bool]) -> None:
    logits = torch.randn(4, 3, 2, requires_grad=True)
    power_grad_cross_entropy(logits, torch.zeros(4, 2, dtype=torch.long), 0.25).backward()
    rows = torch.randn(4, 3, requires_grad=True)
    target = torch.zeros(4, dtype=torch.long)
    power_grad_cross_entropy(rows, target, 0.25, weight=torch.ones(3)).backward()
    assert taken == [False, False]
    power_grad_cross_entropy(rows, target, 0.25).backward()


def test_the_loss_may_be_changed_in_place(taken: list[bool]) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = power_grad_cross_entropy(logits, torch.zeros(4, dtype=torch.long), 0.25)
    loss /= 2
    loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("classes", [10, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_the_formula_captured_or_not(classes: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(64, classes)).to(dtype).cuda().requires_grad_()
    target = torch.randint(classes, (64,)).cuda()
    target[5] = -100
    assert powergrad._fits_kernels(logits, target, None)
    for options in OPTIONS:

        def both(options: dict[str, Any] = options) -> Tensor:
            loss = power_grad_cross_entropy(logits, target, **options)
            (gradient,) = torch.autograd.grad(loss.sum() * 3, logits)
            return torch.cat((loss.detach().reshape(-1).float(), gradient.flatten().float()))

        torch.cuda.set_sync_debug_mode("error")
        try:
            found = both()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        capture = CudaCapture(logits.device)
        capture.warm_up(both)
        replay, captured = capture.capture(both)
        replay()
        assert torch.equal(captured, found)
        loss, gradient = found[: -logits.numel()], found[-logits.numel() :].view_as(logits)
        alpha, smoothing, reduction = options.values()
        z, counted = logits.detach().double(), target != -100
        wanted = F.cross_entropy(z, target, label_smoothing=smoothing, reduction=reduction)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        wanted = wanted.reshape(-1)
        torch.testing.assert_close(loss.double(), wanted, rtol=tolerance, atol=tolerance)
        q = torch.full_like(z, smoothing / classes)
        q[counted, target[counted]] += 1 - smoothing
        scale = 3 / (counted.sum() if reduction == "mean" else 1)
        slope = ((alpha * z).softmax(1) - q) * counted.unsqueeze(1) * scale
        torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * 1e-2)
