"""The PowerGrad Transform (PGT): the loss, its theory, and a plain reference to check them against.

PGT replaces the probabilities p by p' ∝ p^α (Eq. 5) in the backward pass of cross-entropy, so that
the gradient at the logits becomes p' − q (Eq. 6). Since p is a softmax, p' is softmax(α·z): the
gradient is exactly that of CE(α·z, q) / α, whatever the batch size and the loss scale.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgt_diag.errors import ConfigurationError
from pgt_diag.reductions import working_kernels

_LOG2_E = 1 / math.log(2)
_AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(name)
)


def power_grad_cross_entropy(
    logits: Tensor,
    target: Tensor,
    alpha: float,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy with its ordinary value, and the gradient p' − q in place of p − q.

    All but the gradient follows `torch.nn.functional.cross_entropy`, and at α = 1 the gradient too.
    α = 0 makes p' uniform over all classes (Prop. 1), those with a logit of −inf included; at every
    α > 0 such a class has p' = 0. With class weights w the gradient is Σ(w·q)·p' − w·q, that of
    CE(α·z, q) / α. Target probabilities that require a gradient receive that of the value.
    Differentiating twice gives the derivative of p' − q. Works under autocast, any loss scale, DDP
    and torch.compile; the transforms of torch.func refuse it.

    Shapes: logits (C), (N, C) or (N, C, d1, …). target: class indices (), (N) or (N, d1, …), or
        class probabilities shaped like the logits. weight: (C), treated as a constant.
        Returns () for the reductions "mean" and "sum", the shape of class indices for "none".
    Dtypes: any floating type, computed in at least float32. The loss has the type cross_entropy
        would give it, under autocast too; the gradient has that of the logits. For backward no
        more is kept than cross_entropy keeps: one tensor of the size of the logits.
    Raises: ConfigurationError (a ValueError) for α or label smoothing outside [0, 1], an unknown
        reduction, and for a target shaped like the logits that is not floating point or comes with
        an ignore_index; for the rest what cross_entropy raises.
    Source: Eq. 5 and 6; `torch.nn.functional.cross_entropy`.
    """
    _require_fraction("alpha", alpha)
    _require_fraction("label_smoothing", label_smoothing)
    _require_reduction(reduction)
    if target.shape == logits.shape:
        _require_probabilities(target, ignore_index)
    result_dtype, dtype = _result_and_compute_dtype(logits, target)
    if weight is not None:
        weight = weight.detach().to(dtype)

    needs_gradient = torch.is_grad_enabled() and (logits.requires_grad or target.requires_grad)
    half_precision = result_dtype != dtype
    options = _Options(alpha, ignore_index, reduction, label_smoothing, dtype, keep_logits=True)
    if needs_gradient and (alpha < 1 or half_precision) and _fits_kernels(logits, target, weight):
        loss = cast(Tensor, _KernelPowerGradCrossEntropy.apply(logits, target, options))
    elif not needs_gradient or (alpha == 1 and not half_precision):
        loss = F.cross_entropy(
            logits.to(dtype),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    else:
        # A float32 tensor would double what cross_entropy keeps for half-precision logits, and the
        # gradient of target probabilities needs log p: these recompute from the logits in backward.
        options = options._replace(keep_logits=half_precision or target.requires_grad)
        loss, _ = _PowerGradCrossEntropy.apply(logits, target, weight, options)
    return loss.to(result_dtype)


class PowerGradCrossEntropyLoss(nn.Module):
    """`power_grad_cross_entropy` as a module, with the arguments of `torch.nn.CrossEntropyLoss`.

    Shapes and dtypes: those of `power_grad_cross_entropy`; `weight` (C) is a buffer.
    Raises: ConfigurationError (a ValueError) for α or label smoothing outside [0, 1], an unknown
        reduction, and an ignore_index that is no whole number.
    Source: Eq. 5 and 6; `torch.nn.CrossEntropyLoss`.
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.25,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _require_fraction("alpha", alpha)
        _require_fraction("label_smoothing", label_smoothing)
        _require_reduction(reduction)
        if type(ignore_index) is not int:
            raise ConfigurationError(f"ignore_index is {ignore_index!r}; it must be a whole number")
        self.alpha = alpha
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (N, C, …) against class indices or class probabilities."""
        return power_grad_cross_entropy(
            logits,
            target,
            self.alpha,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        """Return the arguments for `repr`."""
        return (
            f"alpha={self.alpha}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        )


def power_grad_transform(probabilities: Tensor, alpha: float) -> Tensor:
    """Return p' = p^α / Σ p^α for each distribution p along the last dimension.

    Takes 0^0 as 1, so that α = 0 gives the uniform distribution (Prop. 1) whatever the zeros in p;
    at every α > 0 a zero stays a zero.

    Shapes: probabilities (…, C), non-negative, not all zero; returns (…, C).
    Dtypes: any floating type, computed in at least float32, returned in the type given.
    Raises: ConfigurationError (a ValueError) for α outside [0, 1].
    Source: Eq. 5.
    """
    _require_fraction("alpha", alpha)
    powers = probabilities.to(_at_least_float32(probabilities.dtype)).pow(alpha)
    return (powers / powers.sum(-1, keepdim=True)).to(probabilities.dtype)


def stationary_threshold(probabilities: Tensor, alpha: float) -> Tensor:
    """Return T(α) = (Σ p^α)^(1/(α−1)), below which the transform raises p and above lowers it.

    T(α) = exp(−H_α(p)) with H_α the Rényi entropy: it grows from 1/C at α = 0 to exp(Σ p·log p),
    its limit at α = 1. As in `power_grad_transform`, 0^0 is 1.

    Shapes: probabilities (…, C), each distribution summing to 1; returns (…).
    Dtypes: any floating type, computed in at least float32, returned in the type given.
    Raises: ConfigurationError (a ValueError) for α outside [0, 1].
    Source: Lemma 1, Prop. 1, Theorem 1.
    """
    _require_fraction("alpha", alpha)
    p = probabilities.to(_at_least_float32(probabilities.dtype))
    if alpha == 1:
        log_threshold = torch.xlogy(p, p).sum(-1)
    else:
        # Σ p^α is 1 + Σ (p^α − p). Written with expm1 and log1p it loses no digits where α → 1
        # turns log(Σ p^α) / (α − 1) into 0/0, and p^α·(1 − p^(1−α)) does not overflow for tiny p.
        excess = -(p.pow(alpha) * torch.expm1((1 - alpha) * p.log())).sum(-1)
        log_threshold = -torch.log1p(excess) / (1 - alpha)
    return log_threshold.exp().to(probabilities.dtype)


def power_grad_gradient_reference(
    logits: Tensor, target_probabilities: Tensor, alpha: float
) -> Tensor:
    """Return softmax(α·z) − q in float64: the plain form that the loss is tested against.

    Shapes: logits and target_probabilities (N, C); returns (N, C), one gradient per example, to be
        averaged or summed as the reduction asks.
    Raises: ConfigurationError (a ValueError) for α outside [0, 1].
    Source: Eq. 5 and 6.
    """
    _require_fraction("alpha", alpha)
    z = logits.double()
    # Shifted first: α·z itself would lose digits of a large z.
    z = alpha * (z - z.amax(-1, keepdim=True))
    return z.softmax(-1) - target_probabilities.double()


class _Options(NamedTuple):
    alpha: float
    ignore_index: int
    reduction: str
    smoothing: float
    dtype: torch.dtype
    keep_logits: bool


class _PowerGradCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose backward has p' where its own has p.

    The second output, log2 p^α, exists to be kept for backward. Being an output it also makes the
    double backward right (see `backward`).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        log_p = F.log_softmax(logits, _class_dim(logits), dtype=options.dtype)
        if target.shape == logits.shape:
            loss = _loss_for_probabilities(log_p, target, weight, options)
        else:
            loss = _loss_for_indices(log_p, target, weight, options)
        exponents = None if options.keep_logits else _exponents_(log_p, options.alpha)
        ctx.save_for_backward(logits if exponents is None else exponents, target, weight)
        ctx.set_materialize_grads(False)
        ctx.logits_dtype = logits.dtype
        ctx.options = options
        return loss, exponents

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_exponents: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        kept, target, weight = ctx.saved_tensors
        options: _Options = ctx.options
        exponents = kept
        if options.keep_logits:
            log_p = F.log_softmax(kept, _class_dim(kept), dtype=options.dtype)
            exponents = _exponents_(log_p.clone(), options.alpha)

        grad_logits = grad_target = None
        if grad_loss is not None:
            # p^α needs no shift by its maximum: p ≥ 1/C for some class, so Σ p^α is at least 1 and
            # each p^α at most 1. Only here, so that the gradient can take the powers' place: one
            # pass over memory less. 2^x, because torch's exp is three times slower on some CPUs.
            powers = exponents.exp2()
            if target.shape != kept.shape:
                grad_logits = _gradient_for_indices(powers, target, weight, grad_loss, options)
            else:
                grad_logits = _gradient_for_probabilities(
                    powers, target, weight, grad_loss, options
                )
            if ctx.needs_input_grad[1]:
                grad_target = _target_gradient(log_p, weight, grad_loss, options).to(target.dtype)
        # Differentiating the gradient once more arrives here. It depends on the exponents only
        # through p', which no summand per example can change, so they may be taken as α·log2(e)·z.
        if grad_exponents is not None:
            through_exponents = (options.alpha * _LOG2_E) * grad_exponents
            grad_logits = (
                through_exponents if grad_logits is None else grad_logits + through_exponents
            )
        if grad_logits is not None:
            grad_logits = grad_logits.to(ctx.logits_dtype)
        return grad_logits, grad_target, None, None


class _KernelPowerGradCrossEntropy(torch.autograd.Function):
    """The same for class indices, by a GPU's kernels: two launches forward, one backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, options: _Options) -> Tensor:
        kernels = working_kernels(logits.device)
        ctx.named = {
            "alpha": _without_underflow(options.alpha),
            "smoothing": options.smoothing,
            "ignore_index": options.ignore_index,
            "reduction": options.reduction,
        }
        loss, kept = kernels.write_losses(logits, target, **ctx.named)
        ctx.save_for_backward(logits, target, kept)
        ctx.options = options
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, target, kept = ctx.saved_tensors
        if not torch.is_grad_enabled():
            kernels = working_kernels(logits.device)
            return kernels.write_gradient(logits, target, kept, grad_loss, **ctx.named), None, None
        # Its own derivative is asked for.
        options: _Options = ctx.options
        log_p = F.log_softmax(logits, 1, dtype=options.dtype)
        powers = _exponents_(log_p.clone(), options.alpha).exp2()
        gradient = _gradient_for_indices(powers, target, None, grad_loss, options)
        return gradient.to(logits.dtype), None, None


def _fits_kernels(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether a GPU's kernels compute this loss."""
    if not logits.is_cuda or weight is not None or torch.compiler.is_compiling():
        return False
    kernels = working_kernels(logits.device)
    return kernels is not None and bool(kernels.takes_loss(logits, target))


def _without_underflow(alpha: float) -> float:
    # In float32 it would be 0 or lose its digits; every finite log p gives p^α = 1 there.
    return 0.0 if alpha < torch.finfo(torch.float32).tiny else alpha


def _loss_for_indices(
    log_p: Tensor, target: Tensor, weight: Tensor | None, options: _Options
) -> Tensor:
    """Return what cross_entropy returns for log_p (N, C, …) and class indices (N, …)."""
    ignore_index, reduction, smoothing = options.ignore_index, options.reduction, options.smoothing
    loss = F.nll_loss(log_p, target, weight, ignore_index=ignore_index, reduction=reduction)
    if smoothing == 0:
        return loss
    dim = _class_dim(log_p)
    rows = log_p if weight is None else log_p * _per_class(weight, log_p)
    rows = -rows.sum(dim).masked_fill(target == ignore_index, 0.0)
    if reduction != "none":
        rows = rows.sum()
    if reduction == "mean":
        rows = rows / _target_weight(target, weight, options).sum()
    return (1 - smoothing) * loss + smoothing / log_p.shape[dim] * rows


def _loss_for_probabilities(
    log_p: Tensor, target: Tensor, weight: Tensor | None, options: _Options
) -> Tensor:
    """Return what cross_entropy returns for log_p (N, C, …) and class probabilities (N, C, …)."""
    rows = -(log_p * _weighted_probabilities(target, weight, options)).sum(_class_dim(log_p))
    if options.reduction == "none":
        return rows
    return rows.sum() if options.reduction == "sum" else rows.mean()


def _gradient_for_indices(
    powers: Tensor, target: Tensor, weight: Tensor | None, grad_loss: Tensor, options: _Options
) -> Tensor:
    """Return the gradient at the logits where the target is class indices.

    Shapes: powers (N, C, …), p^α, overwritten unless grad mode is on; target (N, …); weight (C);
        grad_loss () or (N, …); returns (N, C, …).
    """
    dim = _class_dim(powers)
    counted = target != options.ignore_index
    index = (target.long() * counted).unsqueeze(dim)
    scale = grad_loss
    if options.reduction == "mean" and weight is None:
        scale = grad_loss / counted.sum(dtype=grad_loss.dtype)
    elif options.reduction == "mean":
        scale = grad_loss / _target_weight(target, weight, options).sum()
    # `where`, since a batch that is ignored altogether has just divided by 0: its gradient is 0.
    scale = torch.where(counted, scale, 0.0).unsqueeze(dim)

    hit = scale if weight is None else scale * weight[index]
    if options.smoothing == 0:
        grad = _scaled(powers, hit / powers.sum(dim, keepdim=True))
        return _subtract_at_(grad, dim, index, hit)
    hit = hit * (1 - options.smoothing)
    share = scale * (options.smoothing / powers.shape[dim])
    classes = powers.shape[dim] if weight is None else weight.sum()
    grad = _scaled(powers, (hit + share * classes) / powers.sum(dim, keepdim=True))
    _subtract_at_(grad, dim, index, hit)
    return grad.sub_(share if weight is None else share * _per_class(weight, powers))


def _subtract_at_(grad: Tensor, dim: int, index: Tensor, hit: Tensor) -> Tensor:
    """Subtract hit (N, 1, …) from grad (N, C, …) at index (N, 1, …)."""
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        # scatter_add_ would then ask the CPU for help, which nothing captured as a CUDA graph can.
        classes = torch.arange(grad.shape[dim], device=grad.device)
        return grad.sub_(torch.where(_per_class(classes, grad) == index, hit, 0.0))
    return grad.scatter_add_(dim, index, -hit)


def _gradient_for_probabilities(
    powers: Tensor, target: Tensor, weight: Tensor | None, grad_loss: Tensor, options: _Options
) -> Tensor:
    """Return the gradient at the logits where the target is class probabilities.

    Shapes: powers (N, C, …), p^α, overwritten unless grad mode is on; target (N, C, …); weight (C);
        grad_loss () or (N, …); returns (N, C, …).
    """
    dim = _class_dim(powers)
    q = _weighted_probabilities(target, weight, options)
    scale = _probability_scale(powers, grad_loss, options)
    grad = _scaled(powers, scale * q.sum(dim, keepdim=True) / powers.sum(dim, keepdim=True))
    return grad.addcmul_(q, scale, value=-1)


def _target_gradient(
    log_p: Tensor, weight: Tensor | None, grad_loss: Tensor, options: _Options
) -> Tensor:
    """Return the gradient at target probabilities, (N, C, …): that of the value, −w·log p."""
    grad = (options.smoothing - 1) * _probability_scale(log_p, grad_loss, options) * log_p
    return grad if weight is None else grad * _per_class(weight, log_p)


def _target_weight(target: Tensor, weight: Tensor | None, options: _Options) -> Tensor:
    """Return the class weight of each index in target (N, …), 0 where it is to be ignored."""
    counted = target != options.ignore_index
    if weight is None:
        return counted
    return weight[target.long() * counted] * counted


def _weighted_probabilities(target: Tensor, weight: Tensor | None, options: _Options) -> Tensor:
    """Return w·q for the smoothed q of class probabilities (N, C, …)."""
    target = target.to(options.dtype)
    if options.smoothing > 0:
        uniform = target.new_full((), 1 / target.shape[_class_dim(target)])
        target = target.lerp(uniform, options.smoothing)
    return target if weight is None else target * _per_class(weight, target)


def _probability_scale(logits: Tensor, grad_loss: Tensor, options: _Options) -> Tensor:
    """Return d(loss)/d(example's loss)·grad_loss, () or (N, 1, …), for class probabilities."""
    dim = _class_dim(logits)
    if options.reduction == "none":
        return grad_loss.unsqueeze(dim)
    if options.reduction == "mean":
        return grad_loss / (logits.numel() // logits.shape[dim])
    return grad_loss


def _class_dim(logits: Tensor) -> int:
    return 1 if logits.ndim > 1 else 0


def _per_class(weight: Tensor, logits: Tensor) -> Tensor:
    """Return the class weights (C) shaped to multiply logits (N, C, d1, …)."""
    return weight.view(-1, *(1 for _ in range(logits.ndim - 2)))


def _exponents_(log_p: Tensor, alpha: float) -> Tensor:
    """Turn log p into log2 p^α, in place."""
    # 0·(−inf) is NaN where 0^0 has to be 1 (Prop. 1), also for an α that underflows to 0. Every
    # finite log p gives 1 there, so any finite floor will do.
    if alpha < torch.finfo(log_p.dtype).tiny:
        log_p.clamp_(min=-1.0)
    return log_p.mul_(alpha * _LOG2_E)


def _scaled(powers: Tensor, factor: Tensor) -> Tensor:
    """Return powers·factor, in place unless the product is to be differentiated."""
    return powers * factor if torch.is_grad_enabled() else powers.mul_(factor)


def _result_and_compute_dtype(logits: Tensor, target: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the type cross_entropy's loss would have, and the type to compute in."""
    result = logits.dtype
    if target.is_floating_point():
        result = torch.promote_types(result, target.dtype)
    dtype = _at_least_float32(result)
    # Autocast runs cross_entropy in float32, and so returns that.
    device = logits.device.type
    # Not every device has it, and torch 2.11 cannot compile the question which do.
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        result = dtype
    return result, dtype


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _require_fraction(name: str, value: Any) -> None:
    # Written so that NaN, which fails every comparison, fails this one.
    if value is None or isinstance(value, str) or not 0 <= value <= 1:
        raise ConfigurationError(f"{name} is {value}; it must lie in [0, 1]")


def _require_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ConfigurationError(f'reduction is {reduction!r}; it must be "none", "mean" or "sum"')


def _require_probabilities(target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise ConfigurationError(
            f"target is {target.dtype} and shaped like the logits, which makes it class "
            "probabilities: pass them in floating point, or class indices without a class dimension"
        )
    # As in cross_entropy, whose default of −100 stands for none.
    if ignore_index >= 0:
        raise ConfigurationError(
            f"ignore_index is {ignore_index}: class probabilities have no index to ignore"
        )
