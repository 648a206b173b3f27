"""Triton kernels for a GPU: what the recorder measures, in few launches and few bytes.

torch's own operations take two launches for each layer's norms, and read all of every map. Each
kernel here has a plain counterpart in `reductions.py` or in torch, which is used where Triton is
not there or does not work: see `usable`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from pgt_diag.kernels.loss import takes_loss, write_gradient, write_losses
from pgt_diag.kernels.maps import add_gap, mark_active, takes_relu, write_relu
from pgt_diag.kernels.norms import is_dense, keep_row, write_filter_norms, write_total
from pgt_diag.kernels.sgd import Update, step_sgd

__all__ = [
    "Update",
    "add_gap",
    "is_dense",
    "keep_row",
    "mark_active",
    "step_sgd",
    "takes_loss",
    "takes_relu",
    "usable",
    "write_filter_norms",
    "write_gradient",
    "write_losses",
    "write_relu",
    "write_total",
]


def usable(device: torch.device) -> bool:
    """Whether the kernels run on the device and are right there: Triton needs a compiler, too."""
    told = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")  # looking at the results waits for them
    try:
        return _work(device)
    except Exception:  # whatever a missing compiler, an old driver or another GPU may raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(told)


def _work(device: torch.device) -> bool:
    return (
        _norms_work(device) and _sgd_works(device) and _maps_work(device) and _losses_work(device)
    )


def _norms_work(device: torch.device) -> bool:
    random = torch.Generator().manual_seed(0)
    shapes = ((5, 3, 3), (3, 1500), (7, 64, 3, 3))
    weights = [torch.randn(shape, generator=random, device="cpu").to(device) for shape in shapes]
    weights[0][1] *= 1e-30
    weights[0][2] = 0
    outs = [torch.full((len(weight),), -1.0, device=device) for weight in weights]
    write_filter_norms(weights, outs)
    expected = [weight.double().flatten(1).norm(dim=1) for weight in weights]
    pairs = list(zip(outs, expected, strict=True))
    total = torch.full((2,), -1.0, device=device)
    write_total(outs[0], outs[1], total[0])
    pairs += [(total, torch.stack((torch.cat(expected[:2]).norm(), total.new_tensor(-1.0))))]
    kept = torch.zeros(3, device=device)
    row, blank = outs[1].clone(), torch.ones(3, device=device)
    keep_row(row, blank, kept)
    pairs += [(kept, expected[1]), (row, blank)]
    return all(
        torch.allclose(one.double(), other.double(), rtol=1e-5, atol=0) for one, other in pairs
    )


def _sgd_works(device: torch.device) -> bool:
    random = torch.Generator().manual_seed(0)
    updates, expected = [], []
    for shape in ((3, 5), (4, 32)):
        weight, gradient, momentum = (
            torch.randn(3, *shape, generator=random, device="cpu").to(device).unbind()
        )
        velocity = 0.9 * momentum + gradient + 0.1 * weight
        change = gradient + 0.1 * weight + 0.9 * velocity
        expected.append((weight - 0.5 * change, velocity, gradient.norm(dim=1)))
        norms = torch.full((2, len(weight)), -1.0, device=device)
        updates.append(Update(weight, gradient, momentum, *norms))
    step_sgd(updates, 0.5, None, momentum=0.9, weight_decay=0.1, nesterov=True)
    found = [
        (update.weight, update.momentum, update.gradient_norms, update.weight_norms)
        for update in updates
    ]
    wanted = [(*values, values[0].norm(dim=1)) for values in expected]
    return all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-5)
        for some, others in zip(found, wanted, strict=True)
        for one, other in zip(some, others, strict=True)
    )


def _maps_work(device: torch.device) -> bool:
    values = torch.zeros(40, 70, 6, 5, device=device)
    values[-1, 1::2, -1, -1] = 1e-30
    values[0, 2, 0, 0] = -1
    last = values.contiguous(memory_format=torch.channels_last)
    right = True
    for shown in (values, last):
        for positive in (True, False):
            actives = torch.zeros(2, 70, device=device).unbind()
            read = mark_active(shown, actives, positive=positive)
            expected = (shown > 0 if positive else shown != 0).any(3).any(2).any(0)
            right = right and read and all(bool((each == expected).all()) for each in actives)
            squares = torch.ones(70, device=device)
            added = add_gap(shown, squares, positive=positive)
            means = (shown.clamp_min(0) if positive else shown).double().mean((2, 3))
            expected = 1 + means.square().sum(0)
            right = right and added and torch.allclose(squares.double(), expected)
    wanted = last.relu()
    expected = (wanted > 0).any(3).any(2).any(0)
    for agree in (True, False):
        results, active = torch.full_like(last, -1.0), torch.zeros(70, device=device)
        write_relu(last, results, [active], agree=agree)
        right = right and torch.equal(results, wanted) and bool((active == expected).all())
    return right


def _losses_work(device: torch.device) -> bool:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3000, generator=random, device="cpu").to(device)
    target = torch.tensor([7, 2999, -100, 0, 1], device=device)
    alpha, counted = 0.25, target != -100
    named: dict[str, Any] = {"alpha": alpha, "smoothing": 0.1, "ignore_index": -100}
    loss, kept = write_losses(logits, target, **named, reduction="mean")
    one = torch.ones((), device=device)
    gradient = write_gradient(logits, target, kept, one, **named, reduction="mean")
    z = logits.double()
    expected = F.cross_entropy(z, target, label_smoothing=0.1)
    q = torch.full_like(z, 0.1 / 3000)
    q[counted, target[counted]] += 0.9
    slope = ((alpha * z).softmax(1) - q) * counted.unsqueeze(1) / 4
    return bool(
        torch.allclose(loss.double(), expected) and torch.allclose(gradient.double(), slope)
    )
