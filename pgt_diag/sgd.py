"""SGD that measures filters on the way: its step reads every gradient and writes every weight.

To read them again for their norms takes a GPU longer than all else that is recorded of a small
network's step.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pgt_diag.reductions import rows_of, working_kernels


class MeasuringSGD(torch.optim.SGD):
    """`torch.optim.SGD(..., fused=True)`; after `measure()` the next step also writes norms.

    That step is made by a kernel of our own: equal to torch's but for rounding.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, fused=True)
        self._norms: Mapping[Tensor, tuple[Tensor, Tensor]] | None = None

    def measured(self) -> list[Tensor]:
        """Return the parameters that the next step changes, or none if it cannot measure them."""
        groups = self.param_groups
        changed = [p for group in groups for p in group["params"] if p.grad is not None]
        if not changed or (kernels := working_kernels(changed[0].device)) is None:
            return []
        unusual = any(group["dampening"] or group["maximize"] for group in groups)
        if unusual or getattr(self, "grad_scale", None) is not None:
            return []
        for parameter in changed:
            momentum = self.state[parameter].get("momentum_buffer")
            alike = [parameter, parameter.grad, momentum]
            if any(
                each is None
                or each.dtype != torch.float32
                or each.device != changed[0].device
                or each.stride() != parameter.stride()
                or not kernels.is_dense(rows_of(each))
                for each in alike
            ):
                return []
        return changed

    def measure(self, norms: Mapping[Tensor, tuple[Tensor, Tensor]]) -> None:
        """Have the next step write, for each parameter of `measured()`, two (filters,) norms.

        The first are those of the gradient as the step gets it, the second those of the parameter
        after the step; float32, contiguous. A vector is one filter.
        """
        self._norms = norms

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make a step; see `torch.optim.SGD.step`."""
        norms, self._norms = self._norms, None
        if norms is None:
            # Where torch has wrapped SGD's own step, it would call this step's hooks once more.
            return inspect.unwrap(torch.optim.SGD.step)(self, closure)
        kernels = working_kernels(next(iter(norms)).device)
        for group in self.param_groups:
            updates = [
                kernels.Update(
                    rows_of(parameter.detach()),
                    rows_of(parameter.grad),
                    rows_of(self.state[parameter]["momentum_buffer"]),
                    *norms[parameter],
                )
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            kernels.step_sgd(
                updates,
                group["lr"],
                getattr(self, "found_inf", None),
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
            )
        return None
