"""Adaptive gradient clipping (AGC): no filter's gradient may outgrow the filter.

The paper's other rule, GC, is `torch.nn.utils.clip_grad_norm_` over all parameters
(`clip_global_norm_`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pgt_diag.errors import ConfigurationError
from pgt_diag.reductions import (
    SAFE_NORM,
    exact_norms,
    filter_norms,
    fitted,
    is_asynchronous,
    rows_of,
    take_norms_again,
)


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> list[Tensor]:
    """Scale each filter's gradient g to λ·max(‖w‖, ε) where ‖g‖ exceeds that, in place.

    λ is `clip_factor` and ε is `eps`, in units of the weight norm. A filter is one index of a
    parameter's first dimension; a scalar or a vector (a bias) is one filter. Without the floor ε a
    filter at zero would never receive gradient again, and never revive. Unscale gradients first.

    Returns the factors applied, one tensor per parameter in the order given; 1 where nothing was
    clipped or there is no gradient. Nothing here waits for the device. What is not finite is not
    repaired: a NaN makes its filter's gradient NaN, an infinity becomes NaN and the finite values
    beside it 0, as in timm; other filters do not notice.

    Shapes: parameters, one tensor or any number, of any shape; each factor (filters,), or (1,) for
        a scalar or a vector.
    Dtypes: any floating type; norms in at least float32, factors returned in float32.
    Raises: ConfigurationError (a ValueError) unless λ and ε are positive and finite, and parameters
        are tensors.
    Source: Brock et al. 2021 (arXiv 2102.06171), Eq. 3; google-deepmind/deepmind-research,
        nfnets/optim.py.
    """
    return _clip_(_listed(parameters), clip_factor, eps)[0]


@torch.no_grad()
def clip_filters_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Do what `adaptive_clip_grad_` does; return the factors, and the gradients' norms after it.

    Shapes: both one tensor per parameter, (filters,) or (1,) float32; a norm is NaN where there is
        no gradient.
    Raises: as `adaptive_clip_grad_`.
    """
    parameters = _listed(parameters)
    factors, norms = _clip_(parameters, clip_factor, eps)
    for parameter, norm in zip(parameters, norms, strict=True):
        if parameter.grad is not None and not is_asynchronous(parameter):
            take_norms_again(rows_of(parameter.grad), norm)
    return factors, norms


@torch.no_grad()
def clip_global_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their L2 norm is at most `max_norm`; return it before.

    The norm is a scalar, (); without gradients it is 0. On a CPU finite gradients have a finite
    norm: torch's squares overflow from 1e19 on, and its clipping then makes zeros of them all.

    Source: `torch.nn.utils.clip_grad_norm_`, which it equals elsewhere.
    """
    parameters = list(parameters)
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if not is_asynchronous(norm) and norm.isinf():
        norms = [exact_norms(gradient.reshape(1, -1)) for gradient in gradients]
        norm = exact_norms(torch.stack(norms, dim=1))[0]
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def agc_parameters(model: nn.Module, include_classifier: bool = False) -> list[nn.Parameter]:
    """Return the parameters AGC acts on: all but the classifier's weight and bias.

    The classifier is the last `nn.Linear` in module order, or, in a network that has none
    (SqueezeNet), the last convolution, which then is what turns features into classes.

    Source: timm's train.py, which leaves out the classifier's weight and bias; NFNets leaves out
        only its weight.
    """
    if include_classifier:
        return list(model.parameters())
    modules = list(model.modules())
    layers: list[nn.Module] = [m for m in modules if isinstance(m, nn.Linear)]
    if not layers:
        layers = [m for m in modules if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    classifier = {id(parameter) for layer in layers[-1:] for parameter in layer.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in classifier]


@torch.no_grad()
def _clip_(
    parameters: Sequence[Tensor], clip_factor: float, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Do what `clip_filters_` does; on a CPU, norms below `SAFE_NORM` may be wrong, or 0."""
    _require_positive("clip_factor", clip_factor)
    _require_positive("eps", eps)
    factors: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    together: dict[Any, list[int]] = {}
    largest_is_safe = min(eps, clip_factor * eps) >= SAFE_NORM
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:
            factors[index] = torch.ones(_filters(parameter), device=parameter.device)
            norms[index] = torch.full_like(factors[index], torch.nan)
        elif largest_is_safe and not is_asynchronous(parameter):
            factors[index], norms[index] = _clip_one_(parameter, parameter.grad, clip_factor, eps)
        else:
            together.setdefault((parameter.device, parameter.dtype), []).append(index)
    for indices in together.values():
        clipped = _clip_alike_([parameters[index] for index in indices], clip_factor, eps)
        for index, factor, norm in zip(indices, *clipped, strict=True):
            factors[index], norms[index] = factor, norm
    return [factors[index] for index in sorted(factors)], [norms[index] for index in sorted(norms)]


def _clip_one_(
    parameter: Tensor, gradient: Tensor, clip_factor: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Clip one parameter's gradient on a CPU: in few operations, while its cache has the numbers.

    The largest norm allowed must be a safe one: a smaller gradient, however imprecise its norm, is
    then not clipped. Returns the factors and the norms afterwards, (filters,) or (1,) float32.
    """
    weights, norms = _filter_norms(parameter), _filter_norms(gradient)
    if np.isinf(np.maximum(weights.numpy(), norms.numpy())).any():
        return _clip_exactly_(parameter, gradient, clip_factor, eps)
    # A gradient of 0 gives infinity here, and so the factor 1.
    factors = weights.clamp_(min=eps).mul_(clip_factor).div_(norms).clamp_(max=1.0)
    gradient.mul_(factors)
    return factors.flatten().float(), norms.mul_(factors).flatten().float()


def _clip_exactly_(
    parameter: Tensor, gradient: Tensor, clip_factor: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Do what `_clip_one_` does in float64, where squares are too large to add up in float32."""
    weights, norms = exact_norms(rows_of(parameter)), exact_norms(rows_of(gradient))
    factors = weights.clamp_(min=eps).mul_(clip_factor).div_(norms).clamp_(max=1.0)
    gradient.copy_(gradient.double() * _by_filter(factors, gradient))
    return factors.float(), fitted(norms.mul_(factors), torch.float32)


def _by_filter(factors: Tensor, gradient: Tensor) -> Tensor:
    """Return (filters,) factors shaped to multiply a gradient; a vector is one filter."""
    return factors.view([-1, *[1] * gradient.dim()][: gradient.dim()])


def _filter_norms(tensor: Tensor) -> Tensor:
    """Return L2 norms over all dims but the first, kept: (filters, 1, …), or () for a vector."""
    dims = tuple(range(1, tensor.dim())) or None
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(
        tensor, dim=dims, keepdim=dims is not None, dtype=dtype
    )
    return norms


def _clip_alike_(
    parameters: Sequence[Tensor], clip_factor: float, eps: float
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Clip the gradients of parameters of one device and dtype: a GPU has few operations to start.

    Returns factors and norms afterwards, (filters,) or (1,) float32.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sizes = [_filters(parameter) for parameter in parameters]
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    both: Tensor = parameters[0].new_empty(2, sum(sizes), dtype=dtype)
    filter_norms([rows_of(parameter) for parameter in parameters], torch.split(both[0], sizes))
    filter_norms([rows_of(gradient) for gradient in gradients], torch.split(both[1], sizes))
    # In float64: between the smallest limit and the largest gradient lies more than float32 has.
    weights, norms = both.double()
    # A gradient of 0 gives infinity here, and so the factor 1.
    factors = weights.clamp_(min=eps).mul_(clip_factor).div_(norms).clamp_(max=1.0)
    for gradient, factor in zip(gradients, torch.split(factors, sizes), strict=True):
        gradient.mul_(_by_filter(factor, gradient))
    norms.mul_(factors)
    return torch.split(factors.float(), sizes), torch.split(norms.float(), sizes)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    whole = isinstance(parameters, nn.Module)
    listed: list[Any] = [parameters] if whole else list(parameters)
    for each in listed:
        if not isinstance(each, Tensor):
            raise ConfigurationError(
                f"parameters holds a {type(each).__name__}; give tensors, such as "
                "model.parameters()"
            )
    return listed


def _filters(parameter: Tensor) -> int:
    return len(parameter) if parameter.dim() > 1 else 1


def _require_positive(name: str, value: Any) -> None:
    # Written so that NaN, which fails every comparison, fails this one.
    if value is None or isinstance(value, str) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name} is {value}; it must be positive and finite")
