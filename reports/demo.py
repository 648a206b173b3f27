"""Made-up runs: what `pgt-diag report --demo` and the tests show. Nothing here was measured.

The curves imitate a long training of the non-BN ResNet-18: norms that rise and fall, filters
that fall silent and then decay exponentially, a few that come back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pgt_diag.config import Method, RunConfig
from pgt_diag.filters import EVENT_KINDS, deaths
from reports.source import Window

_BLOCK = ("conv1", "conv2")
RESNET18: tuple[tuple[str, int], ...] = (
    ("conv1", 64),
    *((f"layer1.{block}.{conv}", 64) for block in (0, 1) for conv in _BLOCK),
    *(
        (f"layer{stage}.{name}", 32 << stage)
        for stage in (2, 3, 4)
        for name in ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2")
    ),
)
"""Names and filters of the 20 convolutions, in module order."""
_AFTER_ADDITION = ("conv2", "downsample.0")


@dataclass(frozen=True)
class DemoLayer:
    """A convolution of a made-up run."""

    name: str
    index: int
    filters: int
    addition: bool | None = None


@dataclass(frozen=True)
class DemoMaps:
    """Made-up feature maps of made-up images."""

    iteration: int
    layer: str
    maps: np.ndarray
    images: np.ndarray
    labels: tuple[str, ...]


@dataclass(frozen=True)
class DemoRun:
    """A made-up run with the interface of a loaded one.

    `mortality` is the share of the last layer's filters that die; earlier layers lose fewer.
    """

    name: str
    config: RunConfig | None
    mortality: float = 0.3
    iteration_count: int = 36_000
    record_every: int = 24
    shape: tuple[tuple[str, int], ...] = RESNET18
    status: str = "finished"
    extra: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ("ring", "stripes", "checks")
    seed: int = 0

    @property
    def path(self) -> Path:
        """A folder that does not exist."""
        return Path("runs") / self.name

    @property
    def info(self) -> dict[str, Any]:
        """What run.json would hold."""
        return {
            "schema_version": 1,
            "status": self.status,
            "message": None,
            "config": self.config.to_mapping() if self.config else None,
            "model": "resnet18",
            "command": ["pgt-diag", "report", "--demo"],
            "environment": {"note": "made-up data: nothing was trained"},
            "data": None,
            "created": "2026-01-01T00:00:00+00:00",
            "ended": "2026-01-01T02:00:00+00:00",
            "record_every": self.record_every,
            "min_spell": max(1, self.iteration_count // 1000),
            "overhead": {"recorder_seconds": 41.0, "training_seconds": 7200.0},
            "gap_source": "avgpool",
        } | dict(self.extra)

    @cached_property
    def layers(self) -> tuple[DemoLayer, ...]:
        """All convolutions in module order."""
        return tuple(
            DemoLayer(name, i, filters, name.endswith(_AFTER_ADDITION))
            for i, (name, filters) in enumerate(self.shape)
        )

    @cached_property
    def events(self) -> pd.DataFrame:
        """Spells of death with their consequences for the norms, and brief silences."""
        rows = [row for layer in self.layers for row in self._layer_events(layer)]
        columns = ["kind", "layer", "layer_index", "filter", "start_iteration", "end_iteration"]
        table = pd.DataFrame(rows, columns=columns)
        table["end_iteration"] = table["end_iteration"].astype("Int64")
        return table.sort_values("start_iteration", ignore_index=True)

    @cached_property
    def unknown_spells(self) -> pd.DataFrame:
        """Nothing: every state is known."""
        return self.events.iloc[:0]

    def state_counts(self, kind: str, /) -> pd.DataFrame:
        """Count, from the events, the filters of each layer in a state at every iteration.

        Kind "clipped" is made up on the spot for the methods with AGC.
        """
        count = self.iteration_count
        if kind == "clipped":
            return self._clipped()
        counts = {}
        for layer in self.layers:
            mine = self.events[(self.events["layer"] == layer.name) & (self.events["kind"] == kind)]
            steps = np.zeros(count + 1, np.int64)
            ends = mine["end_iteration"].fillna(count).to_numpy(np.int64)
            np.add.at(steps, mine["start_iteration"].to_numpy(np.int64), 1)
            np.add.at(steps, ends, -1)
            counts[layer.name] = np.cumsum(steps[:-1])
        return pd.DataFrame(counts, index=pd.RangeIndex(count, name="iteration"))

    def weight_norms(self, layer: str, /, window: Window | None = None) -> pd.DataFrame:
        """Return norms that rise, fall with the learning rate, and decay after a death."""
        return self._norms(next(each for each in self.layers if each.name == layer))

    def _norms(self, layer: DemoLayer) -> pd.DataFrame:
        rng = self._rng(layer.index)
        rows = self._stored
        time = rows[:, None] / max(1, self.iteration_count)
        start = rng.uniform(0.8, 1.4, layer.filters)
        rise = rng.gamma(3.0, 0.25, layer.filters)
        peak = rng.uniform(0.2, 0.45, layer.filters)
        shape = (time / peak) * np.exp(1 - time / peak)
        walk = np.cumsum(rng.normal(0, 0.002, (len(rows), layer.filters)), axis=0)
        norms = start * (1 - 0.55 * time) + rise * shape + walk
        norms = np.abs(norms) * self._survival(layer, rows)
        return self._table(norms)

    @property
    def mean_clip_factors(self) -> pd.DataFrame:
        """Return factors below 1 for the methods with AGC, NaN for the others."""
        agc = self.config is not None and self.config.method.uses_agc
        factors = 1 - 0.4 * self._clipped() / [layer.filters for layer in self.layers]
        return factors if agc else factors * np.nan

    def gap_norms(self, window: Window | None = None) -> pd.DataFrame:
        """Return pooled features: the last layer's, noisier, exactly 0 where it is silent."""
        if not self.layers:
            return pd.DataFrame()
        last = self.layers[-1]
        rows = self._stored
        norms = self._norms(last).to_numpy() * 2
        norms *= self._rng(900).lognormal(0, 0.05, norms.shape)
        norms[self._survival(last, rows) < 1] = 0
        return self._table(norms)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Accuracies that saturate, a little higher where fewer filters die."""
        epochs = self.config.epochs if self.config else 10
        epoch = np.arange(1, epochs + 1)
        shape = 1 - np.exp(-4 * epoch / epochs)
        noise = self._rng(1000).normal(0, 0.25, (2, epochs)) * (1 - epoch / epochs + 0.2)
        loss = 6.9 - 5.4 * shape
        table = deaths(self.events, self.iteration_count)
        died = table["iteration"].to_numpy()
        back = table["revival_iteration"].fillna(self.iteration_count).to_numpy(np.int64)
        last = np.maximum(epoch * self.iteration_count // epochs - 1, 0)
        seconds = np.full(epochs, 72.0)
        return pd.DataFrame(
            {
                "epoch": epoch - 1,
                "iteration": epoch * self.iteration_count // epochs,
                "train_loss": loss,
                "train_accuracy": (70.0 - 3.6 * self.mortality) * shape + noise[0],
                "test_loss": loss + 0.1,
                "test_accuracy": (68.0 - 3.6 * self.mortality) * shape + noise[1],
                "lr": self._lr(last),
                "seconds": seconds,
                "images_per_second": 92_000 / seconds,
                "recorder_seconds": 0.41,
                "dead_filters": [int(((died <= at) & (back > at)).sum()) for at in last],
            }
        )

    @cached_property
    def iterations(self) -> pd.DataFrame:
        """Loss, accuracy, learning rate and gradient norms of every iteration."""
        count = self.iteration_count
        rng = self._rng(1100)
        time = np.arange(count) / max(1, count)
        norm = 2 + 30 * np.exp(-8 * time) + rng.gamma(2, 0.3, count)
        clips = self.config is not None and self.config.method.uses_gc
        limit = self.config.clip_norm if self.config else np.inf
        factor = np.minimum(1, limit / norm) if clips else np.full(count, np.nan)
        return pd.DataFrame(
            {
                "loss": 6.9 - 5.4 * (1 - np.exp(-4 * time)) + rng.normal(0, 0.1, count),
                "accuracy": 70 * (1 - np.exp(-4 * time)) + rng.normal(0, 2, count),
                "lr": self._lr(np.arange(count)),
                "grad_norm": np.minimum(norm, limit) if clips else norm,
                "grad_norm_before_clip": norm if clips else np.full(count, np.nan),
                "clip_coefficient": factor,
            },
            index=pd.RangeIndex(count, name="iteration"),
        )

    @cached_property
    def feature_maps(self) -> tuple[DemoMaps, ...]:
        """Rectified random convolutions of three drawn images, at five iterations."""
        if len(self.layers) < 2 or not self.iteration_count:
            return ()
        layer = self.layers[1]
        images = _drawn_images()[: len(self.labels)]
        kernels = self._rng(1200).normal(0, 1, (layer.filters, 3, 3))
        snapshots = []
        for iteration in np.unique(np.linspace(0, self.iteration_count - 1, 5).astype(int)):
            maps = np.maximum(_convolve(images[:, 0] / 255.0 - 0.5, kernels), 0)
            dead = self._survival(layer, np.array([iteration]))[0] < 1
            maps[:, dead] = 0
            snapshots.append(
                DemoMaps(int(iteration), layer.name, maps.astype(np.float32), images, self.labels)
            )
        return tuple(snapshots)

    @property
    def _stored(self) -> np.ndarray:
        return np.arange(0, self.iteration_count, self.record_every)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream))

    def _clipped(self) -> pd.DataFrame:
        agc = self.config is not None and self.config.method.uses_agc
        time = np.arange(self.iteration_count) / max(1, self.iteration_count)
        early = np.exp(-6 * time) * agc
        counts = {layer.name: (layer.filters * early).astype(int) for layer in self.layers}
        return pd.DataFrame(counts, index=pd.RangeIndex(self.iteration_count, name="iteration"))

    def _lr(self, iteration: np.ndarray) -> np.ndarray:
        time = iteration / max(1, self.iteration_count)
        peak = self.config.peak_lr if self.config else 0.1
        return np.asarray(
            np.where(time < 0.05, time / 0.05, 0.5 + 0.5 * np.cos(np.pi * time)) * peak
        )

    def _fates(self, layer: DemoLayer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the filters that die, when, and when they revive (−1: never)."""
        rng = self._rng(2000 + layer.index)
        depth = (layer.index + 1) / len(self.layers)
        # The second layer loses more than its depth says: Fig. 4 is to show something.
        share = self.mortality * (0.6 if layer.index == 1 else depth**2)
        dying = np.flatnonzero(rng.random(layer.filters) < share)
        begin = (rng.beta(2, 5, len(dying)) * 0.9 * self.iteration_count).astype(int)
        revives = (rng.random(len(dying)) < 0.08) & layer.name.endswith(_AFTER_ADDITION)
        pause = (0.03 * self.iteration_count * (1 + rng.random(len(dying)))).astype(int)
        return dying, begin, np.where(revives, begin + pause, -1)

    def _survival(self, layer: DemoLayer, rows: np.ndarray) -> np.ndarray:
        """Return what is left of each norm, (rows, filters): 1 while alive, less in death."""
        factor = np.ones((len(rows), layer.filters))
        for dying, begin, end in zip(*self._fates(layer), strict=True):
            for_ever = np.exp(-0.0018 * (36_000 / max(1, self.iteration_count)) * (rows - begin))
            dead = (rows >= begin) & ((end < 0) | (rows < end))
            factor[dead, dying] = np.minimum(for_ever[dead], 1 - 1e-9)
        return factor

    def _layer_events(self, layer: DemoLayer) -> list[tuple[object, ...]]:
        rate = 0.0018 * (36_000 / max(1, self.iteration_count))
        rows: list[tuple[object, ...]] = []
        for dying, begin, end in zip(*self._fates(layer), strict=True):
            until = None if end < 0 else int(end)
            here = (layer.name, layer.index, int(dying))
            rows += [(kind, *here, int(begin), until) for kind in EVENT_KINDS[:2]]
            for kind, ratio in (("collapsed", 1e-2), ("zeroed", 1e-3)):
                start = int(begin - np.log(ratio) / rate)
                if start < (self.iteration_count if until is None else until):
                    rows.append((kind, *here, start, until))
        return rows

    def _table(self, values: np.ndarray) -> pd.DataFrame:
        index = pd.Index(self._stored, name="iteration")
        return pd.DataFrame(values.astype(np.float32), index=index)


def demo_runs(iteration_count: int = 36_000, record_every: int = 24) -> Sequence[DemoRun]:
    """Return a made-up baseline and a made-up PGT run."""
    shared = {"batch_size": 256, "epochs": 100, "dataset": "synthetic"}
    size: dict[str, Any] = {"iteration_count": iteration_count, "record_every": record_every}
    baseline = RunConfig.from_mapping(shared | {"method": Method.BASELINE})
    pgt = RunConfig.from_mapping(shared | {"method": Method.PGT})
    return (
        DemoRun("demo-baseline", baseline, mortality=0.2, **size),
        DemoRun("demo-pgt", pgt, mortality=0.03, seed=1, **size),
    )


def _drawn_images() -> np.ndarray:
    """Return a ring, stripes and a chequerboard, (3, 3, 32, 32) uint8."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    radius = np.hypot(x, y)
    grey = np.stack([np.exp(-((radius - 0.6) ** 2) / 0.03), np.sin(9 * x + 4 * y) > 0, (x * y) > 0])
    tint = np.array([[1.0, 0.9, 0.6], [0.6, 0.9, 1.0], [0.9, 0.7, 0.9]])
    return np.asarray((grey[:, None] * tint[:, :, None, None] * 230 + 15).astype(np.uint8))


def _convolve(images: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Return (images, kernels, height, width): 3×3 correlations with zero padding."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return np.asarray(
        sum(
            kernels[None, :, i, j, None, None] * padded[:, None, i : i + height, j : j + width]
            for i in range(3)
            for j in range(3)
        )
    )
