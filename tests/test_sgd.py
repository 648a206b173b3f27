"""SGD that measures: torch's step, and the norms that separate readings would find."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pgt_diag
from pgt_diag import recorder
from pgt_diag.sgd import MeasuringSGD
from tests import plain_kernels
from tests.loops import batches, norms64, small_net

SETTINGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_kernels.use(monkeypatch, plain_kernels)


def trained(kind: type[torch.optim.SGD], *, measure: bool = False) -> tuple[nn.Module, Any]:
    model = small_net().double() if not measure else small_net()
    optimizer = kind(model.parameters(), **SETTINGS)
    for images, target in batches(4, side=14):
        optimizer.zero_grad()
        F.cross_entropy(model(images.to(model[0].weight.dtype)), target).backward()
        parameters = optimizer.measured() if isinstance(optimizer, MeasuringSGD) else []
        norms: dict[Tensor, tuple[Tensor, Tensor]] = {
            each: tuple(torch.full((len(each) if each.dim() > 1 else 1,), -1.0) for _ in "gw")
            for each in parameters
        }
        if measure and norms:
            optimizer.measure(norms)
        optimizer.step()
        for parameter, (gradient, weight) in norms.items() if measure else ():
            rows = parameter if parameter.dim() > 1 else parameter[None]
            slopes = parameter.grad if parameter.dim() > 1 else parameter.grad[None]
            assert gradient.tolist() == pytest.approx(norms64(slopes), rel=1e-6)
            assert weight.tolist() == pytest.approx(norms64(rows), rel=1e-6)
    return model, optimizer


def test_a_measured_step_is_torchs_and_its_norms_are_right(kernels: None) -> None:
    model, optimizer = trained(MeasuringSGD, measure=True)
    twin, twin_optimizer = trained(torch.optim.SGD)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            optimizer.state[one]["momentum_buffer"].double(),
            twin_optimizer.state[other]["momentum_buffer"],
            rtol=1e-4,
            atol=1e-6,
        )


def test_an_unmeasured_step_is_torchs_to_the_bit_and_its_hooks_run_once() -> None:
    # A plain SGD before it: torch then wraps the step that ours builds upon.
    twin, _ = trained(torch.optim.SGD)
    model, optimizer = trained(MeasuringSGD)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step()
    assert called == ["before", "after"]
    twin_optimizer = torch.optim.SGD(twin.parameters(), **SETTINGS, fused=True)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.data.copy_(one.detach())
        other.grad = one.grad.clone()
    optimizer.step()
    twin_optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_it_cannot_measure_is_left_to_torch(kernels: None) -> None:
    model = small_net()
    optimizer = MeasuringSGD(model.parameters(), **SETTINGS)
    assert optimizer.measured() == [], "there are no gradients yet"
    images, target = next(batches(1, side=14))
    F.cross_entropy(model(images), target).backward()
    assert optimizer.measured() == [], "there is no momentum yet"
    optimizer.step()
    names = [id(each) for each in model.parameters()]
    assert [id(each) for each in optimizer.measured()] == names
    optimizer.grad_scale = torch.tensor(2.0)
    assert optimizer.measured() == [], "gradients are still scaled"
    del optimizer.grad_scale
    optimizer.param_groups[0]["dampening"] = 0.1
    assert optimizer.measured() == []
    optimizer.param_groups[0]["dampening"] = 0
    model[0].weight.grad = model[0].weight.grad.contiguous(memory_format=torch.channels_last)
    assert optimizer.measured() == [], "a gradient is laid out otherwise than its weight"


def test_a_skipped_step_is_measured_and_changes_nothing(tmp_path: Path, kernels: None) -> None:
    model = small_net()
    optimizer = MeasuringSGD(model.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for index, (images, target) in enumerate(batches(5, side=14)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            scaler.scale(loss * (torch.inf if index == 2 else 1)).backward()
            scaler.unscale_(optimizer)
            before = [each.detach().clone() for each in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            assert all(same) if index == 2 else not any(same)
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.iteration_count == 4
    assert run.weight_norms("0").iloc[-1].tolist() == pytest.approx(
        norms64(model[0].weight), rel=1e-6
    )


def test_a_recorder_reads_nothing_that_the_step_has_measured(
    tmp_path: Path, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_net()
    optimizer = MeasuringSGD(model.parameters(), **SETTINGS)
    read: list[int] = []
    counted = recorder.filter_norms

    def filter_norms(weights: Any, outs: Any) -> None:
        read.append(len(weights))
        counted(weights, outs)

    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        monkeypatch.setattr(recorder, "filter_norms", filter_norms)
        for images, target in batches(4, side=14):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    # The first step has no momentum yet: five gradients are read, and two weights.
    assert read == [5, 2]
    assert pgt_diag.load_run(tmp_path / "run").iterations["grad_norm"].gt(0).all()


def test_a_frozen_convolution_is_measured_apart(tmp_path: Path, kernels: None) -> None:
    model = small_net()
    model[0].weight.requires_grad_(requires_grad=False)
    optimizer = MeasuringSGD([p for p in model.parameters() if p.requires_grad], **SETTINGS)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for images, target in batches(3, side=14):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    for layer, module in (("0", model[0]), ("2", model[2])):
        measured = run.weight_norms(layer).iloc[-1].tolist()
        assert measured == pytest.approx(norms64(module.weight), rel=1e-6)
    assert run.gradient_norms("0").isna().all(axis=None)
    assert (run.gradient_norms("2") > 0).any(axis=None)


def test_convolutions_that_share_a_weight_are_all_measured(tmp_path: Path, kernels: None) -> None:
    torch.manual_seed(0)
    one, other = (nn.Conv2d(3, 3, 3, bias=False) for _ in range(2))
    other.weight = one.weight
    model = nn.Sequential(one, nn.ReLU(), other, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    optimizer = MeasuringSGD(model.parameters(), **SETTINGS)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for images, target in batches(3, side=14):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target % 3).backward()
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    for layer in ("0", "2"):
        assert run.weight_norms(layer).iloc[-1].tolist() == pytest.approx(
            norms64(one.weight), rel=1e-6
        )
        assert run.gradient_norms(layer).notna().all(axis=None)
