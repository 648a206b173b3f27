"""Adaptive gradient clipping (AGC): no filter's gradient may outgrow the filter.

The paper's other rule, GC, is `torch.nn.utils.clip_grad_norm_` over all parameters.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pgt_diag.errors import ConfigurationError


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
    Raises: ConfigurationError (a ValueError) unless λ and ε are positive and finite.
    Source: Brock et al. 2021 (arXiv 2102.06171), Eq. 3; google-deepmind/deepmind-research,
        nfnets/optim.py.
    """
    _require_positive("clip_factor", clip_factor)
    _require_positive("eps", eps)
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    with torch.no_grad():
        return [_clip_filters_(parameter, clip_factor, eps) for parameter in parameters]


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


def _clip_filters_(parameter: Tensor, clip_factor: float, eps: float) -> Tensor:
    """Clip one parameter's gradient in place; return its factors, float32 (filters,) or (1,)."""
    grad = parameter.grad
    if grad is None:
        filters = parameter.shape[0] if parameter.ndim > 1 else 1
        return torch.ones(filters, dtype=torch.float32, device=parameter.device)
    largest = clip_factor * _filter_norms(parameter).clamp(min=eps)
    # A gradient of 0 gives infinity here, and so the factor 1.
    factor = (largest / _filter_norms(grad)).clamp(max=1.0)
    grad.mul_(factor)
    return factor.flatten().float()


def _filter_norms(tensor: Tensor) -> Tensor:
    """Return L2 norms over all dims but the first, kept: (filters, 1, …), or () for a vector."""
    dim = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=tensor.ndim > 1, dtype=dtype)
    return norms


def _require_positive(name: str, value: float) -> None:
    # Written so that NaN, which fails every comparison, fails this one.
    if not 0 < value < math.inf:
        raise ConfigurationError(f"{name} is {value}; it must be positive and finite")
