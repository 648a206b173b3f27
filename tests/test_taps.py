"""Which call of a module shows a map, where one is called several times in a forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pgt_diag
from pgt_diag.errors import ConfigurationError
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
