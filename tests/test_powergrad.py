"""The PGT loss: its value is cross-entropy's, its gradient p' − q, and the paper's theory holds."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pgt_diag.errors import ConfigurationError
from pgt_diag.powergrad import (
    PowerGradCrossEntropyLoss,
    power_grad_cross_entropy,
    power_grad_gradient_reference,
    power_grad_transform,
    stationary_threshold,
)

INFINITY = float("inf")
ALPHAS = st.floats(0, 1)


def random_case(seed: int, n: int, c: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return float64 logits (n, c) and class indices (n)."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, c, dtype=torch.float64, generator=generator)
    return logits, torch.randint(c, (n,), generator=generator)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor, scale: float = 1.0) -> Tensor:
    """Return the gradient of scale·loss at `logits`; losses that are no scalar are summed."""
    logits = logits.detach().clone().requires_grad_()
    (scale * loss(logits)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def equivalent_loss(logits: Tensor, target: Tensor, alpha: float, **options: Any) -> Tensor:
    """Return CE(α·z, q) / α, the loss whose honest gradient is PGT's."""
    return F.cross_entropy(alpha * logits, target, **options) / alpha


# The gradient


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 70),
    c=st.integers(1, 40),
    alpha=ALPHAS,
    log2_scale=st.integers(-20, 24),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_gradient_is_the_closed_form_at_any_batch_size_loss_scale_and_dtype(
    seed: int, n: int, c: int, alpha: float, log2_scale: int, dtype: torch.dtype
) -> None:
    logits, target = random_case(seed, n, c)
    logits = logits.to(dtype)
    # float16 gradients overflow and underflow; scales that do are the scaler's affair.
    scale = 2.0**log2_scale if dtype in (torch.float64, torch.float32) else 1.0
    # Summed in float32, as a loss under autocast is, so that only the gradient is rounded.
    actual = gradient(
        lambda z: power_grad_cross_entropy(z, target, alpha, reduction="none").float(),
        logits,
        scale,
    )
    q = F.one_hot(target, c)
    expected = scale * power_grad_gradient_reference(logits, q, alpha)
    assert actual.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.double(), expected, rtol=4 * rounding, atol=scale * 16 * min(rounding, 2**-23)
    )


@pytest.mark.parametrize("n", [3, 48, 64, 100])
@pytest.mark.parametrize("scale", [1.0, 2.0**16, 12345.0])
def test_mean_divides_by_the_batch_once_whatever_the_scale(n: int, scale: float) -> None:
    logits, target = random_case(n, n, 11)
    expected = scale / n * power_grad_gradient_reference(logits, F.one_hot(target, 11), 0.25)
    actual = gradient(lambda z: power_grad_cross_entropy(z, target, alpha=0.25), logits, scale)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13 * scale)


SHAPES = [(5,), (6, 5), (6, 5, 3), (2, 5, 2, 3), (2, 5, 2, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "target_kind", ["indices", "ignoring", "ignoring a class", "probabilities"]
)
def test_every_option_follows_cross_entropy_in_value_and_the_equivalent_loss_in_gradient(
    shape: tuple[int, ...], reduction: str, smoothing: float, weighted: bool, target_kind: str
) -> None:
    torch.manual_seed(5)
    logits = torch.randn(shape, dtype=torch.float64)
    class_dim = min(1, len(shape) - 1)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(5, dtype=torch.float64) + 0.1
    if target_kind == "probabilities":
        target = torch.randn(shape, dtype=torch.float64).softmax(class_dim)
    else:
        target = torch.randint(2, 5, shape[:class_dim] + shape[class_dim + 1 :])
        if target_kind != "indices" and target.ndim:
            options["ignore_index"] = -100 if target_kind == "ignoring" else 1
            target.view(-1)[::3] = options["ignore_index"]

    tracked = logits.clone().requires_grad_()
    loss = power_grad_cross_entropy(tracked, target, 0.3, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, **options))

    upstream = torch.rand_like(loss)
    (actual,) = torch.autograd.grad(loss, tracked, upstream)
    expected = gradient(lambda z: upstream * equivalent_loss(z, target, 0.3, **options), logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_alpha_one_is_cross_entropy(
    smoothing: float, probabilities: bool, dtype: torch.dtype
) -> None:
    logits, target = random_case(1, 23, 17)
    if probabilities:
        target = logits.flip(0).softmax(1).float()
    half = dtype in (torch.bfloat16, torch.float16)
    logits = logits.to(dtype)
    # Half precision is computed in float32; the wider types are equal to the bit.
    reference_logits = logits.float() if half else logits
    ours = gradient(
        lambda z: power_grad_cross_entropy(z, target, 1.0, label_smoothing=smoothing), logits
    )
    theirs = gradient(
        lambda z: F.cross_entropy(z, target, label_smoothing=smoothing), reference_logits
    )
    if half:
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0.01, atol=1e-6)
    else:
        assert torch.equal(ours, theirs)


def test_alpha_just_below_one_joins_cross_entropy() -> None:
    logits, target = random_case(2, 9, 6)
    alpha = math.nextafter(1.0, 0.0)
    torch.testing.assert_close(
        gradient(lambda z: power_grad_cross_entropy(z, target, alpha), logits),
        gradient(lambda z: F.cross_entropy(z, target), logits),
        rtol=1e-12,
        atol=1e-15,
    )


def test_gradcheck_of_the_equivalent_loss_agrees_with_ours() -> None:
    logits, target = random_case(3, 4, 5)
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    options: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1}

    def equivalent(z: Tensor) -> Tensor:
        return equivalent_loss(z, target, 0.4, **options)

    # gradcheck pins the honest gradient numerically; ours, of another value, has to equal it.
    assert torch.autograd.gradcheck(equivalent, logits.clone().requires_grad_())
    torch.testing.assert_close(
        gradient(lambda z: power_grad_cross_entropy(z, target, 0.4, **options), logits),
        gradient(equivalent, logits),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 0.01, 0.25, 0.999])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_logits_of_ten_thousand_lose_nothing(
    dtype: torch.dtype, alpha: float, offset: float
) -> None:
    spread, target = random_case(4, 8, 12, spread=1.0)
    extreme = torch.tensor([[1e4, -1e4, 0.0] * 4], dtype=torch.float64)
    logits = torch.cat((spread + offset, extreme)).to(dtype)
    target = torch.cat((target, torch.tensor([1])))
    actual = gradient(lambda z: power_grad_cross_entropy(z, target, alpha, reduction="sum"), logits)
    expected = power_grad_gradient_reference(logits, F.one_hot(target, 12), alpha)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    value = power_grad_cross_entropy(logits, target, alpha)
    torch.testing.assert_close(value, F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1e-30, 0.25, 0.9])
def test_a_class_masked_with_minus_infinity_gets_no_gradient(
    dtype: torch.dtype, alpha: float
) -> None:
    logits = torch.tensor([[1.0, 2.0, -INFINITY, 0.5]], dtype=dtype)
    target = torch.tensor([1])
    actual = gradient(lambda z: power_grad_cross_entropy(z, target, alpha), logits)
    allowed = [0, 1, 3]
    among_allowed = power_grad_gradient_reference(
        logits[:, allowed], torch.tensor([[0, 1, 0]]), alpha
    )
    assert actual[0, 2] == 0
    torch.testing.assert_close(actual[:, allowed], among_allowed.to(dtype))


@pytest.mark.parametrize("alpha", [0.0, 5e-324, 1e-40])
def test_alpha_zero_is_uniform_over_all_classes_masked_ones_too(alpha: float) -> None:
    logits = torch.tensor([[1.0, 2.0, -INFINITY, 0.5]])
    actual = gradient(lambda z: power_grad_cross_entropy(z, torch.tensor([1]), alpha), logits)
    assert actual.tolist() == [[0.25, -0.75, 0.25, 0.25]]


def test_nan_and_all_masked_rows_are_nan_as_in_cross_entropy() -> None:
    logits = torch.tensor([[0.0, float("nan")], [-INFINITY, -INFINITY], [0.0, 1.0]])
    target = torch.tensor([0, 0, 0])
    for alpha in (0.0, 0.5):
        actual = gradient(
            lambda z, a=alpha: power_grad_cross_entropy(z, target, a, reduction="none"), logits
        )
        assert actual.isnan().all(1).tolist() == [True, True, False]


def test_a_batch_that_is_all_ignored_is_nan_in_value_and_zero_in_gradient() -> None:
    logits, _ = random_case(6, 4, 3)
    target = torch.full((4,), -100)
    for smoothing in (0.0, 0.1):
        tracked = logits.clone().requires_grad_()
        loss = power_grad_cross_entropy(tracked, target, 0.5, label_smoothing=smoothing)
        loss.backward()
        assert loss.isnan()
        assert tracked.grad is not None
        assert torch.equal(tracked.grad, torch.zeros_like(logits))


def test_target_probabilities_receive_the_gradient_of_the_value() -> None:
    logits, _ = random_case(7, 5, 4)
    q = logits.flip(1).softmax(1)
    options: dict[str, Any] = {
        "label_smoothing": 0.1,
        "weight": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
    }
    torch.testing.assert_close(
        gradient(lambda t: power_grad_cross_entropy(logits, t, 0.3, **options), q),
        gradient(lambda t: F.cross_entropy(logits, t, **options), q),
    )
    # And asking for it leaves the gradient of the logits as it is.
    tracked_q = q.clone().requires_grad_()
    torch.testing.assert_close(
        gradient(lambda z: power_grad_cross_entropy(z, tracked_q, 0.3, **options), logits),
        gradient(lambda z: equivalent_loss(z, q, 0.3, **options), logits),
    )


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_second_derivative_is_that_of_the_transformed_probabilities(
    probabilities: bool,
) -> None:
    logits, target = random_case(8, 3, 4)
    if probabilities:
        target = logits.flip(0).softmax(1)

    def first(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        return torch.autograd.grad(loss(z), z, create_graph=True)[0]

    direction = torch.randn(3, 4, dtype=torch.float64)
    ours, equivalent = (
        gradient(lambda z, loss=loss: first(loss, z) * direction, logits)
        for loss in (
            lambda z: power_grad_cross_entropy(z, target, 0.3),
            lambda z: equivalent_loss(z, target, 0.3),
        )
    )
    torch.testing.assert_close(ours, equivalent)


# The authors' code


def authors_gradient(logits: Tensor, target: Tensor, alpha: float, scale: float) -> Tensor:
    """Return what the authors' hook makes of the gradient S·(p − q)/N it is handed.

    It takes the gradient for (p − q)·N: divides by N, adds q, transforms the sum as if it were p,
    subtracts q and multiplies by N again.
    """
    n, c = logits.shape
    q = F.one_hot(target, c).double()
    handed = scale * (logits.softmax(1) - q) / n
    p = handed / n + q
    powers = p**alpha
    return n * (powers / powers.sum(1, keepdim=True) - q)


@pytest.mark.parametrize("n", [8, 16])
def test_equals_the_authors_hook_where_that_is_exact(n: int) -> None:
    logits, target = random_case(9, n, 10)
    scale = float(n**2)
    ours = gradient(lambda z: power_grad_cross_entropy(z, target, 0.25), logits, scale)
    torch.testing.assert_close(ours, authors_gradient(logits, target, 0.25, scale))


def test_differs_from_the_authors_hook_at_another_loss_scale() -> None:
    logits, target = random_case(9, 8, 10)
    ours = gradient(lambda z: power_grad_cross_entropy(z, target, 0.25), logits, 32.0)
    assert (ours - authors_gradient(logits, target, 0.25, 32.0)).norm() > 0.1 * ours.norm()


# Training: precision, scaling, compiling, memory


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**16])
def test_the_gradient_follows_the_loss_scale_to_the_bit_under_autocast(scale: float) -> None:
    torch.manual_seed(1)
    model = nn.Linear(20, 7)
    images, target = torch.randn(12, 20), torch.randint(7, (12,))

    def weight_gradient(factor: float) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = power_grad_cross_entropy(model(images), target, 0.25)
        assert loss.dtype == torch.float32
        return torch.autograd.grad(loss * factor, model.weight)[0]

    assert torch.equal(weight_gradient(scale) / scale, weight_gradient(1.0))


def test_autocast_computes_bfloat16_logits_in_float32() -> None:
    logits, target = random_case(10, 16, 9)
    logits = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = power_grad_cross_entropy(logits, target, 0.25)
        tracked = logits.clone().requires_grad_()
        power_grad_cross_entropy(tracked, target, 0.25, reduction="sum").backward()
    assert torch.equal(loss, F.cross_entropy(logits.float(), target))
    expected = power_grad_gradient_reference(logits, F.one_hot(target, 9), 0.25)
    assert torch.equal(tracked.grad, expected.bfloat16())


@pytest.mark.parametrize("logits_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_type_of_cross_entropys(
    logits_dtype: torch.dtype, target_dtype: torch.dtype, autocast: bool
) -> None:
    logits = torch.randn(3, 4).to(logits_dtype).requires_grad_()
    target = torch.rand(3, 4).to(target_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = F.cross_entropy(logits, target).dtype
        assert power_grad_cross_entropy(logits, target, 0.5).dtype == expected
        with torch.no_grad():
            assert power_grad_cross_entropy(logits, target, 0.5).dtype == expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiles_as_one_graph(smoothing: float) -> None:
    logits, target = random_case(11, 6, 5)
    loss = PowerGradCrossEntropyLoss(alpha=0.25, label_smoothing=smoothing)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradient(lambda z: compiled(z, target), logits),
        gradient(lambda z: loss(z, target), logits),
    )


class Storages(TorchDispatchMode):
    """Knows every storage made under it, and which are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self) -> int:
        return sum(size for storage, size in self.made.items() if not storage.expired())


def kept_bytes(loss: Callable[[Tensor], Tensor], logits: Tensor) -> int:
    """Return the memory that stays alive between forward and backward, the result not counted."""
    leaf = logits.clone().requires_grad_()
    with Storages() as storages:
        result = loss(leaf * 1)
    assert result.requires_grad
    return storages.alive() - result.untyped_storage().nbytes()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_no_more_for_backward_than_cross_entropy(
    smoothing: float, probabilities: bool, dtype: torch.dtype, autocast: bool
) -> None:
    logits = torch.randn(256, 64).to(dtype)
    target = torch.randint(64, (256,))
    if probabilities:
        target = torch.rand(256, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = kept_bytes(
            lambda z: power_grad_cross_entropy(z, target, 0.25, label_smoothing=smoothing), logits
        )
        theirs = kept_bytes(lambda z: F.cross_entropy(z, target, label_smoothing=smoothing), logits)
    assert logits.nbytes <= ours <= theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_one_tensor_of_the_size_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(256, 64).to(dtype).requires_grad_()
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        power_grad_cross_entropy(logits, torch.randint(64, (256,)), 0.25)
    assert [tensor.dtype for tensor in saved if tensor.shape == logits.shape] == [dtype]


def test_backward_can_be_repeated() -> None:
    logits, target = random_case(12, 4, 3)
    tracked = logits.clone().requires_grad_()
    loss = power_grad_cross_entropy(tracked, target, 0.5)
    first = torch.autograd.grad(loss, tracked, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, tracked)[0], first)


# Arguments


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), INFINITY])
def test_alpha_outside_zero_to_one_is_named(alpha: float) -> None:
    logits, target = random_case(13, 2, 3)
    message = rf"alpha is {alpha}; it must lie in \[0, 1\]"
    for call in (
        lambda: power_grad_cross_entropy(logits, target, alpha=alpha),
        lambda: PowerGradCrossEntropyLoss(alpha=alpha),
        lambda: power_grad_transform(logits.softmax(1), alpha),
        lambda: stationary_threshold(logits.softmax(1), alpha),
    ):
        with pytest.raises(ConfigurationError, match=message):
            call()
    assert issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"reduction": "average"}, "reduction is 'average'"),
        ({"target": torch.zeros(3, 4, dtype=torch.int64)}, "target is torch.int64"),
        ({"target": torch.rand(3, 4), "ignore_index": 2}, "ignore_index is 2"),
    ],
)
def test_unusable_arguments_are_named(alpha: float, options: dict[str, Any], message: str) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    arguments = {"target": torch.zeros(3, dtype=torch.int64), **options}
    with pytest.raises(ConfigurationError, match=message):
        power_grad_cross_entropy(logits, alpha=alpha, **arguments)


def test_the_module_is_the_function_with_cross_entropys_arguments() -> None:
    logits, target = random_case(14, 6, 4)
    target[0] = 3
    weight = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
    options: dict[str, Any] = {
        "weight": weight,
        "ignore_index": 3,
        "label_smoothing": 0.1,
        "reduction": "sum",
    }
    module = PowerGradCrossEntropyLoss(alpha=0.6, **options)
    torch.testing.assert_close(
        gradient(lambda z: module(z, target), logits),
        gradient(lambda z: equivalent_loss(z, target, 0.6, **options), logits),
    )
    assert dict(module.named_buffers()).keys() == {"weight"}
    assert "alpha=0.6" in repr(module)
    assert PowerGradCrossEntropyLoss().alpha == 0.25


# The theory


@st.composite
def distributions(draw: st.DrawFn) -> Tensor:
    """Draw a float64 distribution (C), from even to nearly one-hot, sometimes with zeros."""
    c = draw(st.integers(1, 30))
    logits, _ = random_case(draw(st.integers(0, 2**31)), 1, c, draw(st.floats(0, 30)))
    if c > 1 and draw(st.booleans()):
        logits[0, : c // 2] = -INFINITY
    return logits[0].softmax(0)


@settings(max_examples=200, deadline=None)
@given(p=distributions(), alpha=ALPHAS)
def test_lemma_1_probabilities_below_the_threshold_rise_and_above_it_fall(
    p: Tensor, alpha: float
) -> None:
    changed = power_grad_transform(p, alpha)
    threshold = stationary_threshold(p, alpha)
    rounding = 1e-12
    assert abs(changed.sum() - 1) < rounding
    assert (changed[p <= threshold] >= p[p <= threshold] * (1 - rounding)).all()
    assert (changed[p > threshold] <= p[p > threshold] * (1 + rounding)).all()
    # Away from the threshold, and from α = 1 where nothing moves, the inequalities are strict.
    clear = (p > threshold * 1.001) | ((p < threshold * 0.999) & (p > 0))
    if alpha < 0.999:
        assert ((changed > p) == (p < threshold))[clear].all()
    # Order is preserved.
    assert (changed[p.argsort()].diff() >= -rounding).all()


@settings(max_examples=50, deadline=None)
@given(p=distributions())
def test_proposition_1_alpha_zero_is_uniform_with_threshold_one_over_c(p: Tensor) -> None:
    c = len(p)
    torch.testing.assert_close(power_grad_transform(p, 0.0), torch.full_like(p, 1 / c))
    assert stationary_threshold(p, 0.0).item() == pytest.approx(1 / c, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(p=distributions(), alphas=st.tuples(ALPHAS, ALPHAS))
def test_theorem_1_the_threshold_never_falls_as_alpha_grows(
    p: Tensor, alphas: tuple[float, float]
) -> None:
    low, high = (stationary_threshold(p, alpha) for alpha in sorted(alphas))
    assert low <= high * (1 + 1e-12)
    assert stationary_threshold(p, 0.0) <= low * (1 + 1e-12)
    assert high <= stationary_threshold(p, 1.0) * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(p=distributions(), alpha=st.floats(0, 0.95))
def test_the_threshold_is_the_papers_formula(p: Tensor, alpha: float) -> None:
    formula = p.pow(alpha).sum() ** (1 / (alpha - 1))
    torch.testing.assert_close(stationary_threshold(p, alpha), formula, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_threshold_keeps_its_digits_up_to_its_limit_at_alpha_one(dtype: torch.dtype) -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=dtype)
    limit = math.exp(sum(x * math.log(x) for x in (0.5, 0.3, 0.2)))
    assert stationary_threshold(p, 1.0).item() == pytest.approx(limit, rel=4e-7)
    for gap in (1e-5, 1e-9, 1e-12, 2**-53):
        assert stationary_threshold(p, 1 - gap).item() == pytest.approx(limit, rel=gap + 4e-7)


def test_theory_works_along_the_last_dimension_and_in_half_precision() -> None:
    p = torch.randn(2, 3, 8, dtype=torch.float64).softmax(-1).half()
    p[0, 0, 0] = 6e-8  # half precision's smallest: its power is not small
    assert power_grad_transform(p, 0.25).shape == (2, 3, 8)
    assert stationary_threshold(p, 0.25).shape == (2, 3)
    for function in (power_grad_transform, stationary_threshold):
        result = function(p, 0.25)
        assert result.dtype == torch.float16
        torch.testing.assert_close(result, function(p.double(), 0.25).half(), rtol=2e-3, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), c=st.integers(2, 30), alpha=ALPHAS)
def test_the_transform_of_a_softmax_is_the_softmax_of_scaled_logits(
    seed: int, c: int, alpha: float
) -> None:
    logits, _ = random_case(seed, 3, c)
    zero = torch.zeros_like(logits)
    torch.testing.assert_close(
        power_grad_transform(logits.softmax(-1), alpha),
        power_grad_gradient_reference(logits, zero, alpha),
    )
