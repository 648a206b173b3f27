"""What a run costs before it is made: operations counted, memory counted, nothing computed.

All is counted on the meta device, where tensors have shapes and no values. `pgt-diag bench`,
`pgt-diag sweep --dry-run` and tests/benchmarks/table2_cost.py take their numbers from here.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pgt_diag.config import RunConfig
from pgt_diag.models import build_model

IMAGENET = {"train_images": 1_281_167, "test_images": 50_000, "image_size": 224, "classes": 1000}
"""ImageNet-1K's numbers of images and classes, and the paper's size of them."""


@dataclass(frozen=True)
class Cost:
    """What one run takes.

    flops: floating-point operations of the whole run, training and testing; a multiplication and
    an addition count as two. state_bytes: weights, gradients and momentum. bytes_per_image: what
    the forward pass keeps for the backward pass, for each image of a batch, in float32; mixed
    precision takes about half of that.
    """

    flops: float
    state_bytes: int
    bytes_per_image: int
    images_at_once: int
    """Images of a batch, or of the largest of the parts that it is split into."""

    @property
    def memory_bytes(self) -> int:
        """Memory of a training step, at least: state, and what is kept of the images at once."""
        return self.state_bytes + self.images_at_once * self.bytes_per_image


def run_cost(
    config: RunConfig, *, train_images: int, test_images: int, image_size: int, classes: int
) -> Cost:
    """Return what a run of this configuration costs on so many images of image_size² pixels.

    Raises what `build_model` does, and RuntimeError for images that the network cannot take.
    """
    with torch.device("meta"):
        model = build_model(config.model, num_classes=classes, norm=config.norm, stem=config.stem)
    per_epoch = train_images * flops_per_image(model, image_size) + test_images * (
        flops_per_image(model, image_size, training=False)
    )
    copies = 2 if config.momentum else 1  # gradients, and the momentum of each
    tensors = [*model.state_dict().values(), *copies * list(model.parameters())]
    return Cost(
        flops=float(config.epochs) * per_epoch,
        state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        bytes_per_image=kept_bytes_per_image(model, image_size),
        images_at_once=-(-config.batch_size // config.accumulate),
    )


def flops_per_image(model: nn.Module, image_size: int, *, training: bool = True) -> int:
    """Return the floating-point operations per image: of a training step, or of a forward pass.

    A multiplication and an addition count as two. Only what torch counts counts: convolutions and
    matrix products.
    """
    shadow, images = _shadow(model, image_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training):
        logits = shadow(images)
        if training:
            logits.sum().backward()
    return int(counter.get_total_flops()) // len(images)


def kept_bytes_per_image(model: nn.Module, image_size: int) -> int:
    """Return the bytes that a training step's forward pass keeps per image, in float32.

    Each storage that autograd saves counts once, the parameters not at all.
    """
    shadow, images = _shadow(model, image_size)
    parameters = {tensor.untyped_storage()._cdata for tensor in shadow.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shadow(images)
    return sum(storage.nbytes() for storage in kept.values()) // len(images)


def _shadow(model: nn.Module, image_size: int) -> tuple[nn.Module, Tensor]:
    """Return the model on the meta device, and two images: batch norm refuses to train on one."""
    shadow = copy.deepcopy(model).to("meta").train()
    return shadow, torch.empty(2, 3, image_size, image_size, device="meta")
