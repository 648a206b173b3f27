"""What a run costs, against counts by hand and what autograd really keeps."""

import pytest
import torch
from torch import nn

from pgt_diag.config import RunConfig
from pgt_diag.cost import IMAGENET, flops_per_image, kept_bytes_per_image, run_cost
from pgt_diag.models import build_model


def resnet18_kept_values(side: int) -> int:
    """Values kept of an image by the non-BN ResNet-18, whose ReLUs and additions are in place.

    The input of each convolution and each ReLU's output; the pooled positions take two each.
    """
    stem, pooled = 64 * (side // 2) ** 2, 64 * (side // 4) ** 2
    values = 3 * side**2 + stem + (2 + 1) * pooled
    for stage, width in enumerate((64, 128, 256, 512)):
        values += 4 * width * (side // (4 << stage)) ** 2
    return values + 512  # what goes into the classifier


@pytest.mark.parametrize("side", [64, 224])
def test_what_resnet18_keeps_of_an_image_is_what_is_counted_by_hand(side):
    counted = kept_bytes_per_image(build_model("resnet18", num_classes=10), side)
    assert counted == 4 * resnet18_kept_values(side)


def test_what_is_kept_is_what_autograd_saves_on_a_real_device():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
    )
    images = torch.randn(6, 3, 10, 10)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(images)
    weights = {each.data_ptr() for each in model.state_dict().values()}
    real = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    kept = sum(size for place, size in real.items() if place not in weights)
    # Two of batch norm's own, a value per channel, do not grow with the batch.
    assert kept / 6 == pytest.approx(kept_bytes_per_image(model, 10), abs=4 * 2 * 8)


def test_a_run_computes_its_epochs_of_training_and_testing():
    config = RunConfig(epochs=3, warmup_epochs=0, batch_size=10, accumulate=4)
    cost = run_cost(config, train_images=100, test_images=7, image_size=32, classes=5)
    model = build_model("resnet18", num_classes=5)
    training, testing = (flops_per_image(model, 32, training=each) for each in (True, False))
    # Backward takes twice the forward pass, but nobody asks for the gradient of the images.
    first = 2 * 64 * 3 * 49 * 16**2
    assert training == 3 * testing - first
    assert cost.flops == 3 * (100 * training + 7 * testing)
    assert cost.state_bytes == 3 * 4 * sum(each.numel() for each in model.parameters())
    assert cost.images_at_once == 3
    assert cost.memory_bytes == cost.state_bytes + 3 * kept_bytes_per_image(model, 32)


def test_the_papers_network_takes_its_known_operations():
    """1.81 multiply-adds a forward pass (He et al. 2016, Table 1, says 1.8)."""
    cost = run_cost(RunConfig(epochs=1, warmup_epochs=0), **IMAGENET)
    forward = flops_per_image(build_model("resnet18", num_classes=1000), 224, training=False)
    assert forward / 2e9 == pytest.approx(1.81, abs=0.01)
    assert cost.flops == pytest.approx(1_281_167 * 3 * forward, rel=0.04)
