"""Plain references for the recorder: torchvision's forward passes written out, nothing in place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock
from torchvision.models.shufflenetv2 import channel_shuffle


def resnet_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and each convolution's post-activation map of a ResNet of BasicBlocks."""
    maps = {}
    x = maps["conv1"] = F.relu(model.bn1(model.conv1(images)))
    x = model.maxpool(x)
    for name, block in model.named_modules():
        if not isinstance(block, BasicBlock):
            continue
        inner = maps[f"{name}.conv1"] = F.relu(block.bn1(block.conv1(x)))
        skip = x if block.downsample is None else block.downsample(x)
        x = maps[f"{name}.conv2"] = F.relu(block.bn2(block.conv2(inner)) + skip)
        if block.downsample is not None:
            maps[f"{name}.downsample.0"] = x
    return model.fc(x.mean((2, 3))), maps


def se_resnet_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same of timm's SE-ResNet: the gate weighs the last map before the addition."""
    maps = {}
    x = maps["conv1"] = F.relu(model.bn1(model.conv1(images)))
    x = model.maxpool(x)
    for name, block in model.named_modules():
        if not hasattr(block, "se"):
            continue
        parts = [part for part in ("1", "2", "3") if hasattr(block, f"conv{part}")]
        out = x
        for part in parts:
            out = getattr(block, f"bn{part}")(getattr(block, f"conv{part}")(out))
            if part != parts[-1]:
                out = maps[f"{name}.conv{part}"] = F.relu(out)
        squeezed = maps[f"{name}.se.fc1"] = F.relu(block.se.fc1(out.mean((2, 3), keepdim=True)))
        gate = maps[f"{name}.se.fc2"] = torch.sigmoid(block.se.fc2(squeezed))
        skip = x if block.downsample is None else block.downsample(x)
        x = maps[f"{name}.conv{parts[-1]}"] = F.relu(out * gate + skip)
        if block.downsample is not None:
            maps[f"{name}.downsample.0"] = x
    return model.fc(x.mean((2, 3))), maps


def squeezenet_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    maps = {}
    x = images
    for index, layer in enumerate(model.features):
        name = f"features.{index}"
        if isinstance(layer, nn.Conv2d):
            x = maps[name] = F.relu(layer(x))
        elif isinstance(layer, nn.MaxPool2d):
            x = layer(x)
        elif not isinstance(layer, nn.ReLU):
            x = maps[f"{name}.squeeze"] = F.relu(layer.squeeze(x))
            left = maps[f"{name}.expand1x1"] = F.relu(layer.expand1x1(x))
            right = maps[f"{name}.expand3x3"] = F.relu(layer.expand3x3(x))
            x = torch.cat((left, right), 1)
    x = maps["classifier.1"] = F.relu(model.classifier[1](x))
    return x.mean((2, 3)), maps


def _chain(layers: nn.Sequential, name: str, x: Tensor, maps: dict[str, Tensor]) -> Tensor:
    """Run convolutions, norms and ReLUs in order; a map counts at its ReLU, if one follows."""
    last = None
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU | nn.ReLU6):
            x = F.relu6(x) if isinstance(layer, nn.ReLU6) else F.relu(x)
            if last is not None:
                maps[last] = x
            last = None
        else:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                last = f"{name}.{index}"
                maps[last] = x
    return x


def shufflenet_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    maps: dict[str, Tensor] = {}
    x = model.maxpool(_chain(model.conv1, "conv1", images, maps))
    for stage in ("stage2", "stage3", "stage4"):
        for index, block in enumerate(getattr(model, stage)):
            name = f"{stage}.{index}"
            if block.stride == 1:
                left, right = x.chunk(2, dim=1)
            else:
                left, right = _chain(block.branch1, f"{name}.branch1", x, maps), x
            right = _chain(block.branch2, f"{name}.branch2", right, maps)
            x = channel_shuffle(torch.cat((left, right), 1), 2)
    x = _chain(model.conv5, "conv5", x, maps)
    return model.fc(x.mean((2, 3))), maps


def mobilenet_maps(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    maps: dict[str, Tensor] = {}
    x = images
    for index, block in enumerate(model.features):
        name = f"features.{index}"
        if not isinstance(block, InvertedResidual):
            x = _chain(block, name, x, maps)
            continue
        out = x
        for part, layer in enumerate(block.conv):
            if isinstance(layer, nn.Sequential):
                out = _chain(layer, f"{name}.conv.{part}", out, maps)
            else:
                out = layer(out)
                if isinstance(layer, nn.Conv2d):
                    maps[f"{name}.conv.{part}"] = out
        x = x + out if block.use_res_connect else out
    return model.classifier(x.mean((2, 3))), maps
