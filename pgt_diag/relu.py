"""A ReLU that says, while it writes its map, which channels of it are not silent.

To read a map again takes as long as a third of the ReLU itself; on a GPU that is most of what
recording costs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def marking_relu(
    values: Tensor, actives: Sequence[Tensor], kernels: Any, *, inplace: bool
) -> Tensor:
    """Return `torch.relu(values)`, and put 1 into each of `actives` where a channel is not silent.

    values: what `kernels.takes_relu` takes, overwritten with `inplace`; actives: (C,) float32 each.
    """
    result: Tensor = _MarkingReLU.apply(values, actives, kernels, inplace)
    return result


class _MarkingReLU(torch.autograd.Function):
    """Its backward is that of `torch.relu`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, actives: Sequence[Tensor], kernels: Any, inplace: bool
    ) -> Tensor:
        result = values if inplace else torch.empty_like(values)
        kernels.write_relu(values, result, actives)
        if inplace:
            ctx.mark_dirty(values)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, result, 0), None, None, None


class MarkingReLU:
    """Stands in for the `forward` of one ReLU module until `remove()`.

    A copy of the module has an ordinary ReLU.
    """

    def __init__(self, module: nn.ReLU, forward: Callable[[Tensor], Tensor]) -> None:
        self._module = module
        self._forward: Any = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
        module.forward = self  # type: ignore[method-assign]

    def __call__(self, input: Tensor) -> Tensor:
        """Return the ReLU of input."""
        result: Tensor = self._forward(input)
        return result

    def remove(self) -> None:
        """Give the module its own `forward` back."""
        if vars(self._module).get("forward") is self:
            del self._module.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[Tensor], Tensor]:
        return partial(F.relu, inplace=self._module.inplace)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (F.relu,), (F.relu, (), {"inplace": self._module.inplace}, None)
