"""What a report reads of a run: the part of `pgt_diag.run.Run` that pages are made from.

A protocol instead of the class, because the made-up runs of `reports.demo` and of the tests are
runs as well, and because nothing here may depend on how a run is stored.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from pgt_diag.config import RunConfig

Window = Literal["min", "max"]


class Layer(Protocol):
    """One convolution; `index` counts all convolutions in module order, as the paper does.

    `addition`: whether an addition stands before its activation; None where that is not known.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def index(self) -> int: ...  # noqa: D102
    @property
    def filters(self) -> int: ...  # noqa: D102
    @property
    def addition(self) -> bool | None: ...  # noqa: D102


class FeatureMaps(Protocol):
    """One layer's maps of fixed images at one iteration.

    maps: (images, channels, height, width) float32; images: (images, 3, height, width) uint8.
    """

    @property
    def iteration(self) -> int: ...  # noqa: D102
    @property
    def layer(self) -> str: ...  # noqa: D102
    @property
    def maps(self) -> np.ndarray: ...  # noqa: D102
    @property
    def images(self) -> np.ndarray: ...  # noqa: D102
    @property
    def labels(self) -> tuple[str, ...]: ...  # noqa: D102


class Run(Protocol):
    """A recorded run, read only. Every string in it is hostile until escaped."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def info(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def config(self) -> RunConfig | None: ...  # noqa: D102
    @property
    def layers(self) -> Sequence[Layer]: ...  # noqa: D102
    @property
    def metrics(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def iterations(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def iteration_count(self) -> int: ...  # noqa: D102
    @property
    def events(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def unknown_spells(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def feature_maps(self) -> Sequence[FeatureMaps]: ...  # noqa: D102

    @property
    def mean_clip_factors(self) -> pd.DataFrame: ...  # noqa: D102
    def state_counts(self, kind: str, /) -> pd.DataFrame: ...  # noqa: D102
    def weight_norms(  # noqa: D102
        self, layer: str, /, window: Window | None = None
    ) -> pd.DataFrame: ...
    def gap_norms(self, window: Window | None = None) -> pd.DataFrame: ...  # noqa: D102
