"""Convolutions whose weight is computed from other parameters, against plain twins."""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import pgt_diag
from tests.loops import CLASSES, batches, norms64, train_steps


def net() -> nn.Sequential:
    """Two filters of layer "0" are dead: their bias is far below 0."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )
    with torch.no_grad():
        model[0].bias[1] = model[0].bias[4] = -100
    return model


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Doubled())


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.3)


def pruned_twice(module: nn.Module) -> None:
    pruned(module)
    pruned(module)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by a hook": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by a hook": spectral_norm,
    "pruned": pruned,
    "pruned twice": pruned_twice,
    "a parametrisation of one's own": doubled,
}


def make(kind: str) -> nn.Sequential:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        KINDS[kind](model[0])
    return model


def weight_of(module: nn.Module) -> Tensor:
    """Return what a convolution of one of these kinds uses in eval mode, by the kind's formula."""
    named = {
        name.removeprefix("parametrizations.weight."): value.detach().double()
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }
    for g, v in (("weight_g", "weight_v"), ("original0", "original1")):
        if g in named:
            return named[g] * named[v] / named[v].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    original = named.get("weight_orig", named.get("original"))
    for u, v in (("weight_u", "weight_v"), ("0._u", "0._v")):
        if u in named:
            return original / (named[u] @ original.flatten(1) @ named[v])
    return original * named["weight_mask"] if "weight_mask" in named else 2 * original


def twin_gradient(model: nn.Sequential, weight: Tensor, images: Tensor, target: Tensor) -> Tensor:
    """Return the gradient at the weight of the first convolution, as a plain one has it."""
    plain = net().double()
    names = [name for name in plain.state_dict() if name != "0.weight"]
    given = {name: value.double() for name, value in model.state_dict().items() if name in names}
    plain.load_state_dict({**given, "0.weight": weight})
    F.cross_entropy(plain(images.double()), target).backward()
    return plain[0].weight.grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_filter_is_dead_however_its_weight_is_made(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    weights, gradients = [weight_of(model[0])], []
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for images, target in batches(3, side=14):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            # A power iteration has just been made, if any: this is the weight that was used.
            gradients.append(twin_gradient(model, weight_of(model[0]), images, target))
            optimizer.step()
            weights.append(weight_of(model[0]))
    run = pgt_diag.load_run(tmp_path / "run")
    np.testing.assert_allclose(run.weight_norms("0"), [*map(norms64, weights[1:])], rtol=1e-5)
    np.testing.assert_allclose(run.gradient_norms("0"), [*map(norms64, gradients)], rtol=1e-3)
    assert run.state_counts("zero_gradient")["0"].tolist() == [2, 2, 2]
    assert run.state_counts("silent")["0"].tolist() == [2, 2, 2]
    assert run.layers[0].weight_shape == (6, 3, 3, 3)
    grads = [p.grad for p in model.parameters()]
    total = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert run.iterations["grad_norm"].iloc[-1] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recording_changes_no_bit_of_such_a_training(kind: str, tmp_path: Path) -> None:
    states = []
    for record in (False, True):
        model = make(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if record:
            with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
                train_steps(model, optimizer, 4)
                assert len(recorder.convolution_weights) == 1
        else:
            train_steps(model, optimizer, 4)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not model[0]._forward_hooks


def test_accumulation_clipping_and_a_loss_scale_reach_the_gradient_at_the_weight(
    tmp_path: Path,
) -> None:
    model = make("weight norm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight, wanted = weight_of(model[0]), []
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for step, factor in enumerate((1, math.inf, 1, 1)):
            optimizer.zero_grad()
            total = torch.zeros(6, 3, 3, 3, dtype=torch.float64)
            for images, target in batches(2, side=14):
                loss = F.cross_entropy(model(images), target)
                scaler.scale(loss * factor).backward()
                total += twin_gradient(model, weight, images, target)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            if step != 1:
                wanted.append(norms64(total) * 0.1 / float(norm))
    found = pgt_diag.load_run(tmp_path / "run").gradient_norms("0")
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_one_weight_for_two_calls_is_counted_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU(), nn.Flatten())
    plain = nn.Conv2d(3, 3, 3, padding=1).double()
    plain.load_state_dict({"weight": weight_of(conv), "bias": conv.bias.detach()})
    images, target = next(batches(1, side=6))
    twin = F.relu(plain(F.relu(plain(images.double())))).flatten(1)
    F.cross_entropy(twin, target).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        with parametrize.cached():
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    found = pgt_diag.load_run(tmp_path / "run").gradient_norms("0")
    np.testing.assert_allclose(found, 2 * [norms64(plain.weight.grad)], rtol=1e-4)


def test_a_weight_that_changes_its_kind_in_mid_run_is_followed(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer, 1)
        pruned(model[0])
        train_steps(model, optimizer, 2)
        prune.remove(model[0], "weight")
        train_steps(model, optimizer, 1)
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.gradient_norms("0").isna().any(axis=1).tolist() == [False, True, False, False]
    assert run.iterations["grad_norm"].notna().all()
    np.testing.assert_allclose(run.weight_norms("0").iloc[-1], norms64(model[0].weight), rtol=1e-5)
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert run.iterations["grad_norm"].iloc[-1] == pytest.approx(total, rel=1e-5)


def test_a_weight_of_unknown_making_is_unknown(tmp_path: Path) -> None:
    model = net()
    weight = nn.Parameter(model[0].weight.detach().clone())
    del model[0].weight
    model[0].register_parameter("own", weight)
    model[0].register_forward_pre_hook(lambda module, _: setattr(module, "weight", 1 * module.own))
    model[0].weight = weight.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer, 2)
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.weight_norms("0").isna().all(axis=None)
    assert run.gradient_norms("0").isna().all(axis=None)
    assert run.state_counts("zero_gradient")["0"].tolist() == [0, 0]
    assert run.gradient_norms("2").notna().all(axis=None)


def test_a_frozen_computed_weight_and_a_copied_model(tmp_path: Path) -> None:
    model = make("pruned")
    model[0].weight_orig.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer, 1)
        other = make("weight norm")
        with pgt_diag.FilterRecorder(other, tmp_path / "other", optimizer=sgd(other)):
            copied = copy.deepcopy(other)
            train_steps(copied, sgd(copied), 1)
    assert pgt_diag.load_run(tmp_path / "run").gradient_norms("0").isna().all(axis=None)
    assert pgt_diag.load_run(tmp_path / "other").iteration_count == 0


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)
