"""Small networks, batches and a training loop for the recorder's tests."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4


def batches(count: int, size: int = 6, side: int = 40) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(size, 3, side, side, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )


def norms64(parameter: Tensor) -> np.ndarray:
    return np.array([float(row.double().square().sum().sqrt()) for row in parameter.detach()])


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for images, target in batches(steps, side=14):
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
