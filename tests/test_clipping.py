"""AGC: every filter's gradient bounded by the filter's own norm, and by nothing else."""

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
import timm.utils
import torch
import torchvision
from hypothesis import given, settings
from torch import Tensor, nn

from pgt_diag.clipping import adaptive_clip_grad_, agc_parameters, clip_filters_
from pgt_diag.errors import ConfigurationError

SHAPES = [(6, 3, 3, 3), (5, 4), (7,), (), (2, 3, 2), (1, 1, 1, 1)]


def parameter(weight: Tensor, grad: Tensor | None) -> nn.Parameter:
    result = nn.Parameter(weight)
    result.grad = grad
    return result


def random_parameters(seed: int, grad_size: float) -> list[nn.Parameter]:
    """Return float64 parameters of every shape, filters' gradients spread around grad_size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return [
        parameter(
            normal(shape),
            grad_size * normal(shape) * normal(shape[:1] + (1,) * len(shape[1:])).exp(),
        )
        for shape in SHAPES
    ]


def reference_factors(one: nn.Parameter, clip_factor: float, eps: float) -> list[float]:
    """Return one parameter's factors, filter by filter and number by number."""
    assert one.grad is not None
    weight, grad = one.detach(), one.grad
    filters = list(zip(weight, grad, strict=True)) if one.ndim > 1 else [(weight, grad)]
    factors = []
    for w, g in filters:
        weight_norm = math.sqrt(sum(x * x for x in w.flatten().tolist()))
        grad_norm = math.sqrt(sum(x * x for x in g.flatten().tolist()))
        largest = clip_factor * max(weight_norm, eps)
        factors.append(largest / grad_norm if grad_norm > largest else 1.0)
    return factors


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grad_size=st.sampled_from([1e-4, 1e-2, 1.0, 1e3]),
    clip_factor=st.sampled_from([0.01, 0.16, 1.0]),
    eps=st.sampled_from([1e-3, 3.0]),
)
def test_every_filter_is_scaled_as_a_plain_loop_scales_it(
    seed: int, grad_size: float, clip_factor: float, eps: float
) -> None:
    parameters = random_parameters(seed, grad_size)
    expected = [reference_factors(p, clip_factor, eps) for p in parameters]
    before = [p.grad.clone() for p in parameters]
    factors = adaptive_clip_grad_(parameters, clip_factor, eps)

    assert len(factors) == len(parameters)
    for p, grad, factor, wanted in zip(parameters, before, factors, expected, strict=True):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        assert factor.dtype == torch.float32
        torch.testing.assert_close(factor.double(), wanted, rtol=1e-6, atol=0)
        by_filter = wanted.view(-1, *[1] * (p.ndim - 1)) if p.ndim else wanted[0]
        torch.testing.assert_close(p.grad, grad * by_filter, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
def test_equals_timm(clip_factor: float) -> None:
    ours = random_parameters(3, clip_factor)
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    factors = adaptive_clip_grad_(ours, clip_factor)
    timm.utils.adaptive_clip_grad(theirs, clip_factor)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    touched = torch.cat(factors) < 1
    assert touched.any()
    assert not touched.all()


def test_a_gradient_within_the_limit_keeps_every_bit() -> None:
    grad = torch.randn(4, 9)
    weight = 1000 * grad.norm(dim=1, keepdim=True).expand(4, 9)
    one = parameter(weight.clone(), grad.clone())
    (factor,) = adaptive_clip_grad_(one, clip_factor=0.01)
    assert torch.equal(one.grad, grad)
    assert factor.tolist() == [1.0] * 4


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-42])
def test_a_zero_filter_still_receives_gradient(size: float) -> None:
    one = parameter(torch.full((2, 3, 3, 3), size), torch.ones(2, 3, 3, 3))
    (factor,) = adaptive_clip_grad_(one, clip_factor=0.01, eps=1e-3)
    expected = 0.01 * 1e-3
    assert one.grad[0].norm().item() == pytest.approx(expected, rel=1e-5)
    assert factor[0].item() == pytest.approx(expected / math.sqrt(27), rel=1e-5)


def test_a_zero_gradient_stays_zero_with_factor_one() -> None:
    for weight in (torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3)):
        one = parameter(weight, torch.zeros_like(weight))
        (factor,) = adaptive_clip_grad_(one)
        assert not one.grad.any()
        assert (factor == 1).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_filter_that_is_not_finite_stays_so_as_in_timm_and_spoils_no_other(value: float) -> None:
    weight, grad = torch.randn(3, 4), torch.ones(3, 4)
    grad[1, 0] = value
    ours, theirs = (parameter(weight.clone(), grad.clone()) for _ in range(2))
    (factor,) = adaptive_clip_grad_(ours)
    timm.utils.adaptive_clip_grad(theirs)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)
    assert ours.grad.isfinite().all(1).tolist() == [True, False, True]
    assert factor[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    # In float16 the square of 300 overflows, and that of 1e-4 vanishes.
    weight, grad = torch.full((2, 64), 300.0), torch.full((2, 64), 300.0)
    weight[1] = 1e-4
    one = parameter(weight.to(dtype), grad.to(dtype))
    (factor,) = adaptive_clip_grad_(one, clip_factor=0.01, eps=1e-6)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, torch.tensor([0.01, 0.01 * 1e-4 / 300]), rtol=0.01, atol=0)
    assert one.grad.dtype == dtype
    torch.testing.assert_close(one.grad[0].float(), torch.full((64,), 3.0), rtol=0.01, atol=0)


TINY = [1.0, 1e-3, 1e-10, 1e-16, 1e-22, 1e-30, 1e-42, 0.0]


@pytest.mark.parametrize(
    ("clip_factor", "eps"), [(0.01, 1e-3), (1e-12, 1e-2), (1e-21, 1e-3), (1.0, 1e-20), (1e9, 1e-23)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_and_norms_afterwards_are_right_however_small(
    dtype: torch.dtype, clip_factor: float, eps: float
) -> None:
    # A filter for each size of a weight and of a gradient; squares of most underflow in float32.
    generator = torch.Generator().manual_seed(0)
    weight, grad = (
        torch.randn(len(TINY) ** 2, 3, 2, 2, generator=generator)
        * torch.tensor(each)[:, *[None] * 3]
        for each in zip(*itertools.product(TINY, TINY), strict=True)
    )
    one = parameter(weight.to(dtype), grad.to(dtype))
    rows = zip(weight.flatten(1).to(dtype), grad.flatten(1).to(dtype), strict=True)
    parameters = [one, *(parameter(w.clone(), g.clone()) for w, g in rows)]
    before = [p.grad.double().clone() for p in parameters]
    factors, norms = clip_filters_(parameters, clip_factor, eps)
    for p, grad, factor, norm in zip(parameters, before, factors, norms, strict=True):
        wanted = reference_factors(parameter(p.detach().double(), grad), clip_factor, eps)
        filters = grad if p.ndim > 1 else grad[None]
        expected = torch.tensor(wanted) * filters.flatten(1).norm(dim=1)
        torch.testing.assert_close(factor, torch.tensor(wanted).float(), rtol=1e-5, atol=0)
        # Clipped in bfloat16, a gradient is rounded to 1/256.
        rtol = 4e-3 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(norm.double(), expected, rtol=rtol, atol=3e-45)
        assert ((norm == 0) == (filters == 0).flatten(1).all(1)).all()


def test_one_factor_per_filter_also_where_there_is_no_gradient() -> None:
    parameters = [
        parameter(torch.randn(5, 2, 3, 3), None),
        parameter(torch.randn(5), None),
        parameter(torch.tensor(2.0), torch.tensor(8.0)),
        parameter(torch.randn(4, 2), torch.ones(4, 2)),
    ]
    factors = adaptive_clip_grad_(iter(parameters))
    assert [tuple(factor.shape) for factor in factors] == [(5,), (1,), (1,), (4,)]
    assert (torch.cat(factors[:2]) == 1).all()
    assert factors[2].item() == pytest.approx(0.01 * 2 / 8)
    assert parameters[0].grad is None


def test_gradients_that_are_views_of_one_buffer_are_clipped_in_place() -> None:
    # As DDP keeps them (gradient_as_bucket_view).
    buffer = torch.ones(24)
    weights = [torch.full((3, 4), 5.0), torch.full((4, 3), 1e-9).T]
    parameters = [
        parameter(weights[0], buffer[:12].view(3, 4)),
        parameter(weights[1], buffer[12:].view(4, 3).T),
    ]
    adaptive_clip_grad_(parameters, clip_factor=0.1, eps=1e-3)
    expected = torch.cat((torch.full((12,), 0.5), torch.full((12,), 1e-4 / 2)))
    torch.testing.assert_close(buffer, expected)


def test_memory_layout_does_not_matter() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    plain = parameter(weight, grad.clone())
    channels_last = parameter(
        weight.to(memory_format=torch.channels_last),
        grad.clone(memory_format=torch.channels_last),
    )
    factors = adaptive_clip_grad_([plain, channels_last])
    torch.testing.assert_close(*factors)
    torch.testing.assert_close(plain.grad, channels_last.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_factor": 0.0}, "clip_factor is 0.0; it must be positive and finite"),
        ({"clip_factor": -1.0}, "clip_factor is -1.0"),
        ({"clip_factor": math.nan}, "clip_factor is nan"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": math.inf}, "eps is inf"),
        ({"eps": None}, "eps is None"),
        ({"clip_factor": "0.1"}, "clip_factor is 0.1"),
    ],
)
def test_unusable_factors_are_named(options: dict[str, Any], message: str) -> None:
    one = parameter(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ConfigurationError, match=message):
        adaptive_clip_grad_(one, **options)
    assert (one.grad == 1).all()


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.Linear(2, 2).named_parameters(), [None]])
def test_what_is_no_tensor_is_named(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"parameters holds a (Linear|tuple|NoneType)"):
        adaptive_clip_grad_(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clipping_does_not_wait_for_the_device() -> None:
    one = parameter(torch.ones(4, 3, device="cuda"), torch.ones(4, 3, device="cuda"))
    bare = parameter(torch.ones(4, device="cuda"), None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        factors = adaptive_clip_grad_([one, bare])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(factors).tolist() == pytest.approx([0.01] * 4 + [1.0])


def names_left_out(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[str]:
    kept = {id(parameter) for parameter in parameters}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in kept]


CLASSIFIERS = {
    "resnet18": "fc",
    "vgg11": "classifier.6",
    "densenet121": "classifier",
    "mobilenet_v3_small": "classifier.3",
    "efficientnet_b0": "classifier.1",
    "convnext_tiny": "classifier.2",
    "swin_t": "head",
    "vit_b_16": "heads.head",
    "squeezenet1_1": "classifier.1",
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_alone_is_left_out(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    classifier = CLASSIFIERS[name]
    left_out = names_left_out(model, agc_parameters(model))
    assert left_out == [f"{classifier}.weight", f"{classifier}.bias"]
    everything = agc_parameters(model, include_classifier=True)
    assert [id(p) for p in everything] == [id(p) for p in model.parameters()]


def test_a_model_without_layers_to_call_a_classifier_is_taken_whole() -> None:
    model = nn.BatchNorm2d(3)
    assert len(agc_parameters(model)) == 2
