"""What the paper printed, to set ours beside it."""

import math

from pgt_diag.config import Method

TABLE_2 = (
    (1024, Method.BASELINE, math.nan, 66.27, 64.816),
    (1024, Method.PGT, 0.92, 66.62, 65.498),
    (512, Method.BASELINE, math.nan, 68.02, 66.552),
    (512, Method.PGT, 0.25, 69.5, 67.236),
    (256, Method.BASELINE, math.nan, 68.86, 66.796),
    (256, Method.GC, math.nan, 69.04, 67.064),
    (256, Method.AGC, math.nan, 69.06, 67.298),
    (256, Method.PGT, 0.25, 69.97, 67.814),
    (256, Method.GC_PGT, 0.25, 68.67, 67.088),
    (256, Method.AGC_PGT, 0.25, 70.92, 68.856),
)
"""Batch size, method, α (NaN where there is none), train and test accuracy in percent."""
