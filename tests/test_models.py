"""The networks: exactly torchvision's, with and without normalisation."""

import pytest
import torch
import torchvision
from torch import nn

from pgt_diag.config import Norm, Stem
from pgt_diag.errors import ConfigurationError
from pgt_diag.models import build_model


def same_network(ours, reference):
    ours_state, reference_state = ours.state_dict(), reference.state_dict()
    return (
        repr(ours) == repr(reference)
        and list(ours_state) == list(reference_state)
        and all(torch.equal(ours_state[key], reference_state[key]) for key in ours_state)
    )


def modules_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "mobilenet_v2"])
def test_without_norm_equals_torchvision_with_an_identity_norm_layer(name):
    torch.manual_seed(3)
    ours = build_model(name, num_classes=7)
    torch.manual_seed(3)
    builder = torchvision.models.get_model_builder(name)
    assert same_network(ours, builder(norm_layer=nn.Identity, num_classes=7))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "shufflenet_v2_x0_5"])
def test_with_batch_norm_equals_torchvision(name):
    torch.manual_seed(3)
    ours = build_model(name, num_classes=7, norm=Norm.BATCH)
    torch.manual_seed(3)
    assert same_network(ours, torchvision.models.get_model(name, num_classes=7))


def test_resnet18_without_norm_has_the_papers_layers_and_parameters():
    model = build_model("resnet18", num_classes=1000)
    convolutions = modules_of(model, nn.Conv2d)
    assert len(convolutions) == 20
    assert sum(convolution.out_channels for convolution in convolutions) == 4800
    assert all(convolution.bias is None for convolution in convolutions)
    assert not modules_of(model, nn.BatchNorm2d)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_679_912


@pytest.mark.parametrize(
    "name", ["densenet121", "mnasnet0_5", "regnet_y_400mf", "mobilenet_v3_small"]
)
def test_models_that_take_no_norm_layer_lose_their_batch_norm_too(name):
    model = build_model(name, num_classes=5)
    assert not modules_of(model, nn.BatchNorm2d)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_layer_norm_belongs_to_the_architecture_and_stays():
    ours = build_model("swin_t", num_classes=5)
    reference = torchvision.models.swin_t(num_classes=5)
    assert len(modules_of(ours, nn.LayerNorm)) == len(modules_of(reference, nn.LayerNorm)) > 0


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "squeezenet1_1", "alexnet"])
@pytest.mark.filterwarnings("error")
def test_training_forward_returns_logits_and_nothing_else(name):
    model = build_model(name, num_classes=5).train()
    logits = model(torch.zeros(2, 3, 96, 96))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet-18", "resnet18"), ("ResNet50", "resnet50"), ("vgg12", "vgg1")]
)
def test_unknown_name_is_refused_with_the_nearest_ones(name, nearest):
    with pytest.raises(ConfigurationError, match=f"unknown model '{name}'.*{nearest}"):
        build_model(name, num_classes=5)


def test_a_name_like_no_other_is_refused_with_the_place_to_look():
    with pytest.raises(ConfigurationError, match="list_models"):
        build_model("\x1b[31m</b>", num_classes=5)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18"])
def test_models_that_do_not_classify_images_are_refused(name):
    with pytest.raises(ConfigurationError, match="unknown model"):
        build_model(name, num_classes=5)


@pytest.mark.parametrize(
    ("name", "remedy"), [("vgg11", "vgg11_bn"), ("alexnet", "norm none"), ("swin_t", "norm none")]
)
def test_batch_norm_is_refused_where_there_is_none(name, remedy):
    with pytest.raises(ConfigurationError, match=remedy):
        build_model(name, num_classes=5, norm=Norm.BATCH)


@pytest.mark.parametrize("norm", list(Norm))
def test_small_stem_keeps_the_resolution_and_torchvisions_initialisation(norm):
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=5, norm=norm, stem=Stem.SMALL)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.conv1.bias is None
    # kaiming_normal over fan_out with ReLU's gain: variance 2 / (64 · 3 · 3)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_small_stem_is_refused_for_other_networks():
    with pytest.raises(ConfigurationError, match=r"squeezenet1_1.*only ResNets"):
        build_model("squeezenet1_1", num_classes=5, stem=Stem.SMALL)


def test_weights_depend_only_on_the_global_seed():
    def build(seed):
        torch.manual_seed(seed)
        return build_model("resnet18", num_classes=5, stem=Stem.SMALL)

    assert same_network(build(1), build(1))
    assert not same_network(build(1), build(2))
