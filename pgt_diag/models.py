"""Image classifiers by torchvision's and timm's names, with and without normalisation.

timm's begin with `timm/`, as in `timm/seresnet50`, and need the extra `pgt-diag[timm]`. The
paper's subject is ResNet-18 without normalisation, the default here. A user's own network
needs nothing of this module: the recorder attaches to any `nn.Module`.
"""

import importlib
from typing import Any

import torchvision
from torch import nn

from pgt_diag.config import TIMM, Norm, Stem
from pgt_diag.errors import ConfigurationError
from pgt_diag.preflight import missing_timm, no_small_stem, unknown_model

# Both return a tuple while training unless told otherwise, and warn unless the start is named.
_PLAIN_OUTPUT = {"aux_logits": False, "init_weights": True}
_OPTIONS = {"googlenet": _PLAIN_OUTPUT, "inception_v3": _PLAIN_OUTPUT}


def build_model(
    name: str, *, num_classes: int, norm: Norm = Norm.NONE, stem: Stem = Stem.IMAGENET
) -> nn.Module:
    """Build torchvision's or timm's classification model with random weights, without a download.

    `norm` none puts an identity in the place of every `BatchNorm2d` and leaves the rest as it is:
    convolutions that had no bias still have none, so `resnet18` is exactly torchvision's
    `resnet18(norm_layer=torch.nn.Identity)` (20 convolutions, 4,800 filters), and layer
    normalisation (ConvNeXt, ViT, Swin, MaxViT) stays, because it belongs to the architecture.
    Where timm fuses a batch normalisation with its activation, the activation stays. `norm` batch
    is the model as its library builds it. `stem` small gives a ResNet a 3×3 convolution of stride 1
    and no pooling, for images of about 32 pixels.

    The model maps images (N, 3, H, W) float to logits (N, num_classes), also while it trains.
    Weights depend on torch's global random state, as in torchvision.

    Raises ConfigurationError for an unknown name (with the nearest ones), for timm's where it is
    not installed, for batch normalisation in a model that has none, and for the small stem in a
    model that is not a ResNet.

    Source: FACTS "The network"; the small stem is He et al. 2016, arXiv 1512.03385, Section 4.2,
    at ResNet-18's 64 filters.
    """
    if name.startswith(TIMM):
        model, names = _timms(name, num_classes)
    else:
        model, names = _torchvisions(name, num_classes)
    if norm is Norm.NONE:
        _remove_batch_norm(model)
    elif not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        twin = f"use model {name}_bn" if f"{name}_bn" in names else "use norm none"
        raise ConfigurationError(f"norm is batch and model {name} has no batch norm; {twin}")
    if stem is Stem.SMALL:
        _shrink_stem(model, name)
    return model


def _torchvisions(name: str, num_classes: int) -> tuple[nn.Module, list[str]]:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise unknown_model(name, names, "torchvision.models.list_models()")
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **_OPTIONS.get(name, {})
    )
    return model, names


def _timms(name: str, num_classes: int) -> tuple[nn.Module, list[str]]:
    timm = _import_timm(name)
    names = [TIMM + each for each in timm.list_models()]
    # timm also takes names that it downloads (hf-hub:…) or reads from a folder (local-dir:…), and
    # a configuration may be a stranger's: only what it lists is built.
    if name not in names:
        raise unknown_model(name, names, "timm.list_models()")
    model: nn.Module = timm.create_model(
        name.removeprefix(TIMM), pretrained=False, num_classes=num_classes
    )
    return model, names


def _import_timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise missing_timm(name, error) from None


def _remove_batch_norm(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                # timm's BatchNormAct2d is one module with the activation after it.
                after = [getattr(child, part, None) for part in ("drop", "act")]
                kept = [part for part in after if isinstance(part, nn.Module)]
                setattr(parent, name, nn.Sequential(*kept) if kept else nn.Identity())


def _shrink_stem(model: nn.Module, name: str) -> None:
    # timm's ResNet names its first layers as torchvision's does.
    conv1, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    plain = isinstance(conv1, nn.Conv2d) and isinstance(pool, nn.MaxPool2d)
    if type(model).__name__ != "ResNet" or not plain:
        raise no_small_stem(name)
    assert isinstance(conv1, nn.Conv2d)
    filters = conv1.out_channels
    model.conv1 = nn.Conv2d(3, filters, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
