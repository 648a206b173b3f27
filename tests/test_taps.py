"""Which call of a module shows a map, and what stands before an activation, in one forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pgt_diag
from pgt_diag.errors import ConfigurationError
from pgt_diag.models import build_model
from pgt_diag.reading import Layer, read_layers
from tests.loops import CLASSES, batches


class Reused(nn.Module):
    """One ReLU after each of two convolutions; all filters of the second one are dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu, self.fc = nn.ReLU(), nn.Linear(4, CLASSES)
        with torch.no_grad():
            self.c2.bias.fill_(-100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.c2(self.relu(self.c1(x))))
        return self.fc(x.mean((2, 3)))


def record(model: nn.Module, path: Path, **options: Any) -> pgt_diag.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, path, optimizer=optimizer, **options):
        for images, target in batches(2, side=12):
            optimizer.zero_grad()
            F.cross_entropy(model(images).flatten(1), target).backward()
            optimizer.step()
    return pgt_diag.load_run(path)


@pytest.mark.parametrize(
    ("taps", "silent", "activation"),
    [
        (None, 4, "output of relu, call 2"),
        ({"c2": ("relu", 2)}, 4, "output of relu, call 2"),
        ({"c2": ("relu", 1)}, 0, "output of relu"),
        ({"c2": [("relu", 1), ("relu", 2)]}, 0, "output of relu; output of relu, call 2"),
    ],
)
def test_the_call_that_is_named_is_the_one_that_is_read(
    taps: Any, silent: int, activation: str, tmp_path: Path
) -> None:
    run = record(Reused(), tmp_path / "run", taps=taps)
    assert run.state_counts("silent")["c2"].tolist() == [silent, silent]
    assert run.layers[1].activation == activation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": {"c2": "relu"}}, r"'relu' is called more than once .*\{'c2': \('relu', 2\)\}"),
        ({"taps": {"c2": ("relu", 3)}}, r"'relu' has no call 3 .*calls with a map: 1, 2\)"),
        ({"gap_module": "relu"}, r"more than once .*gap_module=\('relu', 2\)"),
    ],
)
def test_a_module_that_is_called_twice_has_to_say_which_call(
    options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        record(Reused(), tmp_path / "run", **options)


def test_the_gap_features_are_those_of_the_call_that_is_named(tmp_path: Path) -> None:
    model = Reused()
    run = record(model, tmp_path / "run", gap_module=("relu", 1))
    images, _ = next(batches(1, side=12))
    expected = F.relu(model.c1(images)).mean((2, 3)).norm(dim=0).detach()
    np.testing.assert_allclose(run.gap_norms().iloc[0], expected, rtol=1e-5)


def plain() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


class Residual(nn.Module):
    """The convolution of `way` before a ReLU."""

    def __init__(self, way: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.scale, self.way, self.relu = nn.Parameter(torch.ones(4, 1, 1)), way, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.way(self.a(x), self.b(x), self)).mean((2, 3))


def additions(model: nn.Module, path: Path) -> dict[str, bool | None]:
    return {layer.name: layer.addition for layer in record(model, path).layers}


def test_a_network_without_additions_has_none(tmp_path: Path) -> None:
    # No activation follows the last one.
    assert additions(plain(), tmp_path / "run") == {"0": False, "2": False, "4": None}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11"])
def test_the_addition_stands_after_a_residual_blocks_last_convolution(
    name: str, tmp_path: Path
) -> None:
    model = build_model(name, num_classes=CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        model.eval()(torch.zeros(1, 3, 32, 32))
    last = {"resnet18": "conv2", "resnet50": "conv3"}.get(name, "nothing")
    for layer in pgt_diag.load_run(tmp_path / "run").layers:
        residual = layer.name.endswith((last, "downsample.0"))
        assert layer.addition is residual, layer.name


@pytest.mark.parametrize(
    ("way", "added"),
    [
        (lambda a, b, m: a + b, True),
        (lambda a, b, m: b.sub_(a), True),
        (lambda a, b, m: (m.scale * a) + 2 * b, True),
        (lambda a, b, m: a + m.scale + 0 * b.mean(), False),
        (lambda a, b, m: a * m.scale + b.detach(), None),
        (lambda a, b, m: a + 1 + 0 * b.detach().mean(), None),
    ],
)
def test_maps_are_added_and_not_numbers_or_biases(way: Any, added: Any, tmp_path: Path) -> None:
    assert additions(Residual(way), tmp_path / "run")["a"] is added


def test_an_addition_is_yes_no_or_unknown_to_a_reader(tmp_path: Path) -> None:
    entry = {"name": "a", "filters": 4, "weight_shape": [4, 3, 3, 3], "activation": "x"}
    [old] = read_layers(tmp_path, [entry])
    assert old == Layer("a", 0, 4, (4, 3, 3, 3), "x", None)
    [new] = read_layers(tmp_path, [{**entry, "addition": True}])
    assert new.addition is True
    with pytest.raises(pgt_diag.PgtDiagError, match="unusable layer list: addition is 'yes'"):
        read_layers(tmp_path, [{**entry, "addition": "yes"}])
