"""The weight that a convolution uses, also where it is no parameter: weight norm, pruning, ….

Such a weight is computed anew in every forward pass, so it has no `.grad`, and to read
`module.weight` may change the training: of a spectral norm it makes a power iteration.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pgt_diag.activations import Convolution, Hook, Node

_WATCHED = "pgt-diag"
_NAN = float("nan")


def parameter_of(module: Convolution) -> nn.Parameter | None:
    """Return a convolution's weight where it is a parameter, which has the gradient at it."""
    return module._parameters.get("weight")


def used_weight(module: Convolution) -> Tensor:
    """Return the weight that a convolution would use now in eval mode, (filters, ...).

    Nothing of the module changes. NaN, (filters, 1), where how it is made is not known.
    """
    weight: Tensor | None = parameter_of(module)
    if weight is not None:
        return weight
    with torch.no_grad():
        weight = _computed(module)
    if weight is None:
        weight = next(module.parameters(), torch.empty(0)).new_full((module.out_channels, 1), _NAN)
    return weight


def weight_shape(module: Convolution) -> tuple[int, ...]:
    """Return the shape of the weight that a convolution uses."""
    weight = parameter_of(module)
    if weight is not None:
        return tuple(weight.shape)
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def _computed(module: Convolution) -> Tensor | None:
    if parametrize.is_parametrized(module, "weight"):
        # Not `module.weight`: within `parametrize.cached()` that is the one of before the step.
        return _in_eval_mode(module.parametrizations["weight"])  # type: ignore[index]
    weight: Tensor | None = None
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            weight = hook.compute_weight(module)
        elif isinstance(hook, SpectralNorm) and hook.name == "weight":
            weight = hook.compute_weight(module, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            weight = hook.apply_mask(module)  # type: ignore[no-untyped-call]
    return weight


def _in_eval_mode(chain: Any) -> Tensor:
    modes = [(module, module.training) for module in chain.modules()]
    try:
        for module, _ in modes:
            module.training = False
        weight: Tensor = chain()
        return weight
    finally:
        for module, training in modes:
            module.training = training


class GradientWatch:
    """Adds up the gradient at the weight that a convolution uses, as `.grad` does at a parameter.

    It is the one tensor that is kept from one hook to another, until the step.
    """

    def __init__(self, module: Convolution) -> None:
        self._module = module
        self._sum: Tensor | None = None
        self._made: dict[nn.Parameter, Tensor] = {}
        """The norms of the parameters' gradients as backward left them, (filters,)."""
        self._handles = [module.register_forward_hook(Hook(self._after_forward))]
        for parameter in self._parameters():
            watch: Any = parameter.register_post_accumulate_grad_hook
            self._handles.append(watch(Hook(self._after_backward)))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take_norms(self) -> Tensor:
        """Return the filters' gradient norms since the last step, (filters,) float64.

        Clipping and a loss scale changed the gradients of the parameters that the weight is made
        of: by as much the gradient at the weight itself is taken to have changed. NaN where
        nothing tells by how much, or no gradient came.
        """
        total, self._sum = self._sum, None
        made, self._made = self._made, {}
        got = {one: _row_norms(one.grad) for one in made if one.grad is not None}
        if total is None or not got:
            return torch.full((self._module.out_channels,), torch.nan, dtype=torch.float64)
        norms = _row_norms(total)
        factors = _joined(list(got.values())) / _joined([made[one] for one in got])
        return torch.where(norms == 0, norms, norms * factors)

    def _parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the weight is made of, those with a row for each filter."""
        names = ("weight_", "parametrizations.weight.")
        return [
            parameter
            for name, parameter in self._module.named_parameters()
            if name.startswith(names)
            and parameter.requires_grad
            and parameter.dim() > 1
            and len(parameter) == self._module.out_channels
        ]

    def _after_forward(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if all(parameter.grad is None for parameter in self._parameters()):
            self._sum = None  # thrown away, as `zero_grad` does
        found = _weight_node(getattr(output, "grad_fn", None))
        if found is None:
            return
        node, index = found
        # Two calls may use one weight, whose gradient comes once.
        if _WATCHED not in node.metadata:
            node.metadata[_WATCHED] = True
            node.register_prehook(lambda gradients: self._add(gradients[index]))

    @torch.no_grad()
    def _add(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            gradient = gradient.detach()
            self._sum = gradient if self._sum is None else self._sum + gradient

    @torch.no_grad()
    def _after_backward(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self._made[parameter] = _row_norms(parameter.grad)


def _weight_node(node: Node | None) -> tuple[Node, int] | None:
    """Return the node that made the weight of a convolution's node, and which of its outputs.

    None where autograd does not show it: in a compiled model, or without a gradient.
    """
    if node is None or node.name() != "ConvolutionBackward0":
        return None
    node, index = node.next_functions[1]
    while node is not None and node.name() == "ToCopyBackward0":  # autocast's
        node, index = node.next_functions[0]
    return None if node is None else (node, index)


def _row_norms(values: Tensor) -> Tensor:
    dims = tuple(range(1, values.dim()))
    norms: Tensor = torch.linalg.vector_norm(values, dim=dims, dtype=torch.float64)
    return norms


def _joined(norms: list[Tensor]) -> Tensor:
    joined: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joined
