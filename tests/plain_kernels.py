"""What `pgt_diag.kernels` does, in plain torch: how it is used is tested where no GPU is."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgt_diag import observer, reductions, ring, sgd
from pgt_diag.kernels import Update, is_dense

__all__ = ["Update", "is_dense"]


def write_filter_norms(weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    for weight, out in zip(weights, outs, strict=True):
        out.copy_(weight.double().flatten(1).norm(dim=1))


def write_total(norms: Tensor, others: Tensor, out: Tensor) -> None:
    out.copy_(torch.cat((norms, others)).double().norm())


def takes_relu(values: Tensor) -> bool:
    return values.dim() == 4


def write_relu(values: Tensor, results: Tensor, actives: Sequence[Tensor]) -> None:
    results.copy_(torch.relu(values))
    mark_active(results, actives, positive=False)


def mark_active(values: Tensor, actives: Sequence[Tensor], *, positive: bool) -> bool:
    shown = values > 0 if positive else values != 0
    for active in actives:
        active.masked_fill_(shown.transpose(0, 1).flatten(1).any(1), 1.0)
    return True


def add_gap(values: Tensor, squares: Tensor, *, positive: bool) -> bool:
    shown = values.relu() if positive else values
    squares += shown.flatten(2).double().mean(2).square().sum(0)
    return True


def keep_row(row: Tensor, blank: Tensor, kept: Tensor) -> None:
    kept.copy_(row)
    row.copy_(blank)


def step_sgd(
    updates: Sequence[Update],
    lr: Tensor | float,
    skip: Tensor | None,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    for update in updates:
        write_filter_norms([update.gradient], [update.gradient_norms])
        if skip is None or not skip:
            decayed = update.gradient + weight_decay * update.weight
            update.momentum.mul_(momentum).add_(decayed)
            change = decayed + momentum * update.momentum if nesterov else update.momentum
            update.weight.sub_(lr * change)
        write_filter_norms([update.weight], [update.weight_norms])


def takes_loss(logits: Tensor, target: Tensor) -> bool:
    return logits.dim() == 2 and target.shape == logits.shape[:1]


def write_losses(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    named: Any = {"ignore_index": ignore_index, "reduction": reduction}
    loss = F.cross_entropy(logits, target, label_smoothing=smoothing, **named)
    return loss, (target != ignore_index).sum()


def write_gradient(
    logits: Tensor,
    target: Tensor,
    kept: Tensor,
    grad_loss: Tensor,
    *,
    alpha: float,
    smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    counted = target != ignore_index
    q = torch.full_like(logits, smoothing / logits.shape[1])
    q[counted, target[counted]] += 1 - smoothing
    scale = grad_loss / (kept if reduction == "mean" else 1)
    return ((alpha * logits).softmax(1) - q) * counted.unsqueeze(1) * scale.reshape(-1, 1)


def use(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    """Let the recorder and the optimizer take `kernels` for those of the CPU."""
    for module in (observer, reductions, ring, sgd):
        monkeypatch.setattr(module, "working_kernels", lambda _: kernels)
