"""Image classifiers by torchvision's names, with and without normalisation.

The paper's subject is ResNet-18 without normalisation, the default here. A user's own network
needs nothing of this module: the recorder attaches to any `nn.Module`.
"""

import difflib

import torchvision
from torch import nn

from pgt_diag.config import Norm, Stem
from pgt_diag.errors import ConfigurationError

# Both return a tuple while training unless told otherwise, and warn unless the start is named.
_PLAIN_OUTPUT = {"aux_logits": False, "init_weights": True}
_OPTIONS = {"googlenet": _PLAIN_OUTPUT, "inception_v3": _PLAIN_OUTPUT}


def build_model(
    name: str, *, num_classes: int, norm: Norm = Norm.NONE, stem: Stem = Stem.IMAGENET
) -> nn.Module:
    """Build a torchvision classification model with random weights; nothing is downloaded.

    `norm` none puts an identity in the place of every `BatchNorm2d` and leaves the rest as it is:
    convolutions that had no bias still have none, so `resnet18` is exactly torchvision's
    `resnet18(norm_layer=torch.nn.Identity)` (20 convolutions, 4,800 filters), and layer
    normalisation (ConvNeXt, ViT, Swin, MaxViT) stays, because it belongs to the architecture.
    `norm` batch is the model as torchvision builds it. `stem` small gives a ResNet a 3×3
    convolution of stride 1 and no pooling, for images of about 32 pixels.

    The model maps images (N, 3, H, W) float to logits (N, num_classes), also while it trains.
    Weights depend on torch's global random state, as in torchvision.

    Raises ConfigurationError for an unknown name (with the nearest ones), for batch normalisation
    in a model that has none, and for the small stem in a model that is not a ResNet.

    Source: FACTS "The network"; the small stem is He et al. 2016, arXiv 1512.03385, Section 4.2,
    at ResNet-18's 64 filters.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ConfigurationError(_unknown(name, names))
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **_OPTIONS.get(name, {})
    )
    if norm is Norm.NONE:
        _remove_batch_norm(model)
    elif not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        twin = f"use model {name}_bn" if f"{name}_bn" in names else "use norm none"
        raise ConfigurationError(f"norm is batch and model {name} has no batch norm; {twin}")
    if stem is Stem.SMALL:
        _shrink_stem(model, name)
    return model


def _unknown(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), names, n=3)
    if near:
        return f"unknown model {name!r}; did you mean {' or '.join(near)}?"
    return f"unknown model {name!r}; take one that torchvision.models.list_models() names"


def _remove_batch_norm(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())


def _shrink_stem(model: nn.Module, name: str) -> None:
    if not isinstance(model, torchvision.models.ResNet):
        raise ConfigurationError(f"stem is small and model is {name}; only ResNets have that stem")
    filters = model.conv1.out_channels
    model.conv1 = nn.Conv2d(3, filters, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
