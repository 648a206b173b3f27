"""pgt-diag: which filters die while a convolutional network trains, when, why, and what helps.

The public names. They are imported when first used, so that `import pgt_diag`, and with it
`pgt-diag --help`, takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgt_diag.clipping import adaptive_clip_grad_
    from pgt_diag.config import RunConfig
    from pgt_diag.errors import PgtDiagError
    from pgt_diag.powergrad import (
        PowerGradCrossEntropyLoss,
        power_grad_cross_entropy,
        power_grad_transform,
        stationary_threshold,
    )
    from pgt_diag.recorder import FilterRecorder
    from pgt_diag.run import Run, load_run

__version__ = "0.1.0"

_HOME = {
    "FilterRecorder": "recorder",
    "PgtDiagError": "errors",
    "PowerGradCrossEntropyLoss": "powergrad",
    "Run": "run",
    "RunConfig": "config",
    "adaptive_clip_grad_": "clipping",
    "load_run": "run",
    "power_grad_cross_entropy": "powergrad",
    "power_grad_transform": "powergrad",
    "stationary_threshold": "powergrad",
}

__all__ = [
    "FilterRecorder",
    "PgtDiagError",
    "PowerGradCrossEntropyLoss",
    "Run",
    "RunConfig",
    "adaptive_clip_grad_",
    "load_run",
    "power_grad_cross_entropy",
    "power_grad_transform",
    "stationary_threshold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pgt_diag' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pgt_diag.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
