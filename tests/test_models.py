"""The networks: exactly torchvision's and timm's, with and without normalisation."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from pgt_diag.config import Norm, Stem, has_stem
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
    with pytest.raises(ConfigurationError, match=f"model is '{name}'.*{nearest}"):
        build_model(name, num_classes=5)


def test_a_name_like_no_other_is_refused_with_the_place_to_look():
    with pytest.raises(ConfigurationError, match="list_models"):
        build_model("\x1b[31m</b>", num_classes=5)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18"])
def test_models_that_do_not_classify_images_are_refused(name):
    with pytest.raises(ConfigurationError, match="there is none"):
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


# timm's


@pytest.mark.parametrize("name", ["seresnet18", "seresnet50", "regnetx_002"])
def test_with_batch_norm_equals_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    ours = build_model(f"timm/{name}", num_classes=7, norm=Norm.BATCH)
    torch.manual_seed(3)
    assert same_network(ours, timm.create_model(name, num_classes=7))


@pytest.mark.parametrize(
    ("plain", "expansion", "blocks"), [("resnet18", 1, (2, 2, 2, 2)), ("resnet50", 4, (3, 4, 6, 3))]
)
def test_the_papers_se_resnets_are_resnets_with_a_gate_in_every_block(plain, expansion, blocks):
    """Two 1×1 convolutions with biases, to a sixteenth of the channels (at least 8) and back."""
    pytest.importorskip("timm")
    model = build_model(f"timm/se{plain}", num_classes=1000, norm=Norm.BATCH)
    reference = build_model(plain, num_classes=1000, norm=Norm.BATCH)
    gates = 0
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        channels = expansion * width
        squeezed = max(8, channels // 16)
        gates += count * (2 * channels * squeezed + squeezed + channels)
    plain_parameters = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(each.numel() for each in model.parameters()) == plain_parameters + gates


@pytest.mark.parametrize("name", ["seresnet18", "efficientnet_b0", "densenet121"])
def test_timms_models_lose_their_batch_norm_and_keep_their_activations(name):
    """timm's BatchNormAct2d holds both."""
    timm = pytest.importorskip("timm")
    model = build_model(f"timm/{name}", num_classes=5)
    assert not modules_of(model, nn.BatchNorm2d)
    kinds = (nn.ReLU, nn.SiLU, nn.Sigmoid)
    with_norm = timm.create_model(name, num_classes=5)
    assert len(modules_of(model, kinds)) == len(modules_of(with_norm, kinds)) > 0
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_timms_plain_resnets_take_the_small_stem():
    pytest.importorskip("timm")
    model = build_model("timm/seresnet18", num_classes=5, norm=Norm.BATCH, stem=Stem.SMALL)
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert has_stem("timm/seresnet18") and has_stem("timm/resnext50_32x4d")
    for name in ("timm/resnet50d", "timm/seresnetaa50d", "timm/resnetv2_50", "timm/vgg11"):
        assert not has_stem(name)
    with pytest.raises(ConfigurationError, match="only ResNets have that stem: use stem imagenet"):
        build_model("timm/resnet18d", num_classes=5, stem=Stem.SMALL)


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/resnet18", "local-dir:/tmp", "resnet18.a1_in1k", "seresnet", "../x"]
)
def test_what_timm_would_fetch_or_does_not_list_is_refused(name):
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError, match="model is 'timm/") as caught:
        build_model(f"timm/{name}", num_classes=5)
    assert "\n" not in str(caught.value)


def test_without_timm_its_models_are_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pgt-diag\[timm\]'") as caught:
        build_model("timm/seresnet50", num_classes=5)
    assert "\n" not in str(caught.value)
