"""ReLUs that mark active channels while they write their map: unnoticed by all but the recorder."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pgt_diag
from pgt_diag.relu import MarkingReLU, marking_relu
from tests import plain_kernels
from tests.loops import CLASSES, batches, small_net, train_steps


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_kernels.use(monkeypatch, plain_kernels)


def recorded(model: nn.Module, path: Path) -> pgt_diag.FilterRecorder:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = pgt_diag.FilterRecorder(model, path, optimizer=optimizer)
    train_steps(model, optimizer)
    return recorder


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("inplace", [False, True])
def test_values_and_gradients_are_those_of_relu(inplace: bool) -> None:
    values = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    values[:, 1] = -1
    values[0, 2, 0, 0] = torch.nan
    results = []
    for ours in (True, False):
        leaf = values.clone().requires_grad_()
        active = torch.zeros(4)
        map_ = leaf * 1
        shown = (
            marking_relu(map_, [active], plain_kernels, inplace=inplace)
            if ours
            else F.relu(map_, inplace=inplace)
        )
        assert (shown is map_) == inplace
        (gradient,) = torch.autograd.grad((shown * shown).nansum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.nansum(), leaf)
        results.append((shown.detach(), gradient.detach(), second))
        if ours:
            assert active.tolist() == [1, 0, 1, 1]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_closed_recorder_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small_net()
    recorder = recorded(model, tmp_path / "run")
    assert replaced(model) == ["1", "3"]
    recorder.close()
    assert replaced(model) == []


def test_copies_have_ordinary_relus(tmp_path: Path) -> None:
    model = small_net()
    images = next(batches(1, side=14))[0]
    with recorded(model, tmp_path / "run"):
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert not any(isinstance(vars(m).get("forward"), MarkingReLU) for m in other.modules())
            assert torch.equal(other(images), model(images))
            assert other[1](torch.tensor([-1.0, 2.0])).tolist() == [0, 2]


def test_a_relu_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    class Loud(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    model = small_net()
    model[1] = Loud()
    theirs = model[3].forward = lambda values: F.relu(values)
    with recorded(model, tmp_path / "run"):
        assert "forward" not in vars(model[1])
        assert vars(model[3])["forward"] is theirs
    assert pgt_diag.load_run(tmp_path / "run").state_counts("silent").shape == (3, 2)


def test_a_second_recorder_finds_the_same_taps(tmp_path: Path) -> None:
    model = small_net()
    with recorded(model, tmp_path / "one"), recorded(model, tmp_path / "two"):
        pass
    one, two = (pgt_diag.load_run(tmp_path / name) for name in ("one", "two"))
    assert [layer.activation for layer in one.layers] == [layer.activation for layer in two.layers]
    assert replaced(model) == []


def test_evaluation_and_recomputed_activations_mark_nothing(tmp_path: Path) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_net()

        def forward(self, images: Tensor) -> Tensor:
            features = checkpoint(self.body[:4], images, use_reentrant=False)
            return self.body[4:](features)

    runs = []
    for way, kind in (("plain", small_net), ("checkpointed", Checkpointed)):
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with pgt_diag.FilterRecorder(model, tmp_path / way, optimizer=optimizer):
            for images, target in batches(4, side=14):
                with torch.no_grad():
                    model.eval()(torch.ones_like(images))
                optimizer.zero_grad()
                F.cross_entropy(model.train()(images), target).backward()
                optimizer.step()
        runs.append(pgt_diag.load_run(tmp_path / way))
    one, other = runs
    assert one.iteration_count == other.iteration_count == 4
    assert one.gap_norms().shape == (4, CLASSES + 1)
    assert one.state_counts("silent").to_numpy().tolist() == (
        other.state_counts("silent").to_numpy().tolist()
    )
