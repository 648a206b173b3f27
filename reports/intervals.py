"""What a handful of runs can tell: the interval of a mean, and whether it is more than chance."""

import math
from collections.abc import Iterable

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z95 = 1.959964


def t95(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t with so many degrees of freedom.

    Source: the expansion about the normal quantile of Abramowitz and Stegun, 26.7.5, where there is
    no table; its error is below 1e-4 from 31 degrees on.
    """
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval95(values: Iterable[float]) -> float:
    """Return the half-width of the 95 % interval of a mean (Student's t); NaN for fewer than 2."""
    sample = np.asarray([value for value in values if math.isfinite(value)])
    if len(sample) < 2:
        return math.nan
    return float(t95(len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))


def leaves_zero_out(values: Iterable[float]) -> bool:
    """Whether a mean difference is more than chance: its 95 % interval is known, and without 0."""
    known = [value for value in values if math.isfinite(value)]
    return len(known) > 1 and abs(sum(known) / len(known)) > interval95(known)
