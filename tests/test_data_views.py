"""Crops, shifts and flips of an image folder, against torchvision's own transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from pgt_diag.config import Augment
from pgt_diag.data.views import View, training_view

RANDOM = {
    Augment.IMAGENET: [v2.RandomResizedCrop(28, (0.08, 1), (3 / 4, 4 / 3))],
    Augment.SMALL: [v2.Resize(32), v2.CenterCrop(28), v2.RandomCrop(28, padding=4)],
}
SIZES = [(200, 150), (37, 90), (28, 28), (9, 300), (300, 9), (1, 1)]


def photograph(width, height):
    picture = Image.fromarray(load_sample_images().images[1])
    return picture.resize((width, height))


@pytest.mark.parametrize("augment", RANDOM)
@pytest.mark.parametrize("size", SIZES)
def test_a_key_draws_what_torchvision_draws_after_that_seed(augment, size):
    picture = photograph(*size)
    reference = v2.Compose([v2.PILToTensor(), *RANDOM[augment], v2.RandomHorizontalFlip()])
    before = torch.get_rng_state()
    for key in (0, 7, 2**64 - 1, *range(100, 125)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            expected = reference(picture)
        view = training_view(augment, 28, picture.size, key)
        assert torch.equal(view.of_picture(picture), expected)
        assert torch.equal(view.of(v2.functional.pil_to_tensor(picture)), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_pixels_are_pillows_to_within_a_gray_level():
    picture = photograph(500, 375)
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    difference = (View(224).of_picture(picture).int() - crop(picture).int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.05


def test_imagenet_crops_keep_to_the_papers_areas_and_ratios_and_flip_half():
    # Red grows to the right and green downwards, so that a crop tells where it was cut.
    red, green = np.meshgrid(np.arange(250), np.arange(250))
    picture = Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))
    areas, ratios, flips = [], [], []
    for key in range(300):
        crop = training_view(Augment.IMAGENET, 50, (250, 250), key).of_picture(picture).float()
        across, down = crop[0].mean(0), crop[1].mean(1)
        # pixel centres of the first and last of 50: 49/50 of the crop
        width = (across[-1] - across[0]).item() * 50 / 49
        height = (down[-1] - down[0]).item() * 50 / 49
        areas.append(abs(width) * height / 250**2)
        ratios.append(abs(width) / height)
        flips.append(width < 0)
    assert min(areas) > 0.075
    assert min(areas) < 0.15
    assert max(areas) > 0.85
    assert min(ratios) > 0.75 * 0.96
    assert max(ratios) < 4 / 3 * 1.04
    assert min(ratios) < 0.8
    assert max(ratios) > 1.25
    assert 120 < sum(flips) < 180


def test_small_augmentation_shifts_the_centre_crop_over_black():
    picture = Image.new("RGB", (32, 32), "white")
    borders = set()
    for key in range(60):
        view = training_view(Augment.SMALL, 32, (32, 32), key).of_picture(picture)
        borders.add(int((view[0] == 0).all(0).sum()))
    assert borders == {0, 1, 2, 3, 4}
