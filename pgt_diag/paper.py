"""What the paper printed, to set ours beside it."""

import math

from pgt_diag.config import Method, Schedule

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

_SE50, _SE18 = "timm/seresnet50", "timm/seresnet18"

TABLE_1 = (
    (_SE50, Schedule.COSINE, Method.BASELINE, math.nan, 81.5, 77.218),
    (_SE50, Schedule.COSINE, Method.PGT, 0.3, 82.47, 77.952),
    ("resnet50", Schedule.COSINE, Method.BASELINE, math.nan, 79.18, 76.56),
    ("resnet50", Schedule.COSINE, Method.PGT, 0.05, 79.68, 77.216),
    ("resnet50", Schedule.STEP, Method.BASELINE, math.nan, 78.99, 75.97),
    ("resnet50", Schedule.STEP, Method.PGT, 0.05, 79.56, 76.494),
    ("resnet101", Schedule.COSINE, Method.BASELINE, math.nan, 82.29, 77.896),
    ("resnet101", Schedule.COSINE, Method.PGT, 0.3, 83.1, 78.258),
    (_SE18, Schedule.COSINE, Method.BASELINE, math.nan, 71.42, 71.09),
    (_SE18, Schedule.COSINE, Method.PGT, 0.25, 71.6, 71.436),
    ("resnet18", Schedule.STEP, Method.BASELINE, math.nan, 69.95, 69.704),
    ("resnet18", Schedule.STEP, Method.PGT, 0.25, 70.3, 69.844),
    ("resnet18", Schedule.COSINE, Method.BASELINE, math.nan, 70.38, 70.208),
    ("resnet18", Schedule.COSINE, Method.PGT, 0.25, 70.53, 70.298),
)
"""Model (with batch normalisation), schedule, method, α, train and test accuracy in percent.

As printed. ResNet-50 in steps has the accuracies of Table 3's second row, where α is 0.3, as it is
in the authors' own list of checkpoints: the 0.05 here is probably a misprint.
"""

TABLE_3 = (
    (Schedule.STEP, 0.0, Method.BASELINE, math.nan, 78.99, 75.97),
    (Schedule.STEP, 0.0, Method.PGT, 0.3, 79.56, 76.494),
    (Schedule.COSINE, 0.0, Method.BASELINE, math.nan, 79.18, 76.56),
    (Schedule.COSINE, 0.1, Method.BASELINE, math.nan, 78.81, 76.698),
    (Schedule.COSINE, 0.0, Method.PGT, 0.3, 79.43, 76.886),
    (Schedule.COSINE, 0.1, Method.PGT, 0.3, 78.47, 76.968),
    (Schedule.COSINE, 0.0, Method.PGT, 0.05, 79.68, 77.216),
    (Schedule.COSINE, 0.1, Method.PGT, 0.05, 77.69, 76.39),
)
"""ResNet-50 with batch normalisation: schedule, label smoothing, method, α, accuracies as above.

In the paper's order; its gap is train minus test.
"""

TABLE_3_MODEL = "resnet50"

FIGURE_2 = (
    ("resnet18", Method.BASELINE, math.nan, 100),
    ("resnet18", Method.PGT, 0.25, 100),
    ("resnet50", Method.BASELINE, math.nan, 100),
    ("resnet50", Method.PGT, 0.3, 100),
    ("resnet50", Method.PGT, 0.3, 60),
)
"""Model, method, α and epochs of the curves. The last is Fig. 2(c)'s, which prints no α."""
