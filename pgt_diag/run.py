"""A recorded run, loaded by anyone who reads it. `directory` has the writing side.

```
runs/<name>/
  run.json              schema version, configuration, environment, layers, status, overhead
  metrics.csv           one row per epoch
  trace/*.parquet       stored rows of norms, a list column per quantity and layer
  iterations/*.parquet  every iteration: loss, accuracy, lr, gradient norm, filters per state
  events.parquet        the event log (events/*.parquet while the run lasts)
  brief_spells.parquet  spells too short for the log, counted per filter
  feature_maps/*.npz    feature maps of fixed images
  .lock                 held by the process that writes here
```
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgt_diag import trace
from pgt_diag.config import RunConfig
from pgt_diag.directory import FEATURE_MAPS_FOLDER, METRICS_FILE, RUN_FILE, SCHEMA_VERSION
from pgt_diag.encoder import SCALARS, resolve_events
from pgt_diag.errors import ConfigurationError, RunDirectoryError
from pgt_diag.filters import EVENT_KINDS

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Layer:
    """A recorded convolution: qualified name, the paper's index, filters, what was observed."""

    name: str
    index: int
    filters: int
    weight_shape: tuple[int, ...]
    activation: str


@dataclass(frozen=True)
class FeatureMaps:
    """Post-activation maps of one layer for fixed images at one iteration.

    maps: (images, channels, H, W) float32; images: (images, 3, H', W') uint8; labels: the images'
    classes. `iteration` is the number of iterations done when they were taken.
    """

    iteration: int
    layer: str
    maps: NDArray[np.float32]
    images: NDArray[np.uint8]
    labels: tuple[str, ...]


class Run:
    """A recorded run, read only. Tables are read when asked for, a layer at a time.

    Safe on a stranger's directory: nothing is unpickled, no code is run. Raises
    RunDirectoryError, naming the file, for what is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        self.info = _read_info(path)
        try:
            self.layers = tuple(
                Layer(**{**layer, "weight_shape": tuple(layer["weight_shape"])})
                for layer in self.info.get("layers", [])
            )
        except (TypeError, KeyError) as error:
            raise RunDirectoryError(f"{path / RUN_FILE}: unusable layer list: {error}") from None
        self._layers = {layer.name: layer for layer in self.layers}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r})"

    @property
    def status(self) -> Literal["running", "finished", "interrupted", "diverged", "failed"]:
        """How the run stands."""
        status: Literal["running", "finished", "interrupted", "diverged", "failed"]
        status = self.info.get("status", "failed")
        return status

    @cached_property
    def config(self) -> RunConfig | None:
        """The configuration of `pgt-diag train`; None for a recorder in somebody's own loop."""
        values = self.info.get("config")
        if values is None:
            return None
        try:
            return RunConfig.from_mapping(values, source=f"{self.path / RUN_FILE}: config")
        except (ConfigurationError, AttributeError) as error:
            raise RunDirectoryError(str(error)) from None

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """One row per epoch."""
        import pandas as pd

        path = self.path / METRICS_FILE
        if not path.exists():
            return pd.DataFrame()
        try:
            return pd.read_csv(path)
        except (ValueError, OSError) as error:
            raise RunDirectoryError(f"{path}: damaged or unreadable: {error}") from None

    @cached_property
    def iterations(self) -> "pd.DataFrame":
        """Every iteration's loss, accuracy (percent), lr, gradient norms, clip coefficient."""
        import pandas as pd

        parts = trace.read_parts(self.path / trace.ITERATIONS_FOLDER, ["iteration", *SCALARS])
        columns: dict[str, Any] = {
            name: np.concatenate([part[name].to_numpy() for part in parts]) if parts else []
            for name in ("iteration", *SCALARS)
        }
        return pd.DataFrame(columns).set_index("iteration")

    @cached_property
    def latest(self) -> dict[str, Any]:
        """The newest iteration on disk, from the newest part alone: `iteration` and SCALARS.

        Empty before the first.
        """
        folder = self.path / trace.ITERATIONS_FOLDER
        for part in trace.read_parts(folder, ["iteration", *SCALARS], newest=True):
            for row in part.slice(part.num_rows - 1).to_pylist():
                return dict(row)
        return {}

    @property
    def iteration_count(self) -> int:
        """How many iterations are on disk."""
        return self.latest["iteration"] + 1 if self.latest else 0

    def state_counts(self, kind: str) -> "pd.DataFrame":
        """Return how many filters of each layer (columns) were in a state at every iteration.

        `kind` is one of silent, zero_gradient, collapsed, zeroed, or clipped.
        """
        if kind not in (*EVENT_KINDS, "clipped"):
            raise ValueError(f"no state {kind!r}; choose one of {', '.join(EVENT_KINDS)}, clipped")
        return self._per_layer(f"{kind}_filters")

    @property
    def mean_clip_factors(self) -> "pd.DataFrame":
        """The mean clip factor of each layer's filters at every iteration; NaN where not told."""
        return self._per_layer("mean_clip_factor")

    def weight_norms(
        self, layer: str, window: Literal["min", "max"] | None = None
    ) -> "pd.DataFrame":
        """Return the filters' weight norms at the stored iterations, a column per filter.

        `window` gives the extremes since the previous stored row instead.
        """
        return self._norms("weight_norm", layer, window)

    def gradient_norms(
        self, layer: str, window: Literal["min", "max"] | None = None
    ) -> "pd.DataFrame":
        """Return the filters' gradient norms, as the optimizer got them; as `weight_norms`."""
        return self._norms("gradient_norm", layer, window)

    def clip_factors(
        self, layer: str, window: Literal["min", "max"] | None = None
    ) -> "pd.DataFrame":
        """Return the factors the filters' gradients were clipped by; NaN where not told."""
        return self._norms("clip_factor", layer, window)

    def gap_norms(self, window: Literal["min", "max"] | None = None) -> "pd.DataFrame":
        """Return the norms over the batch of the GAP features, a column per feature."""
        return self._norms("gap_norm", None, window)

    @cached_property
    def events(self) -> "pd.DataFrame":
        """The event log; `end_iteration` is NA while a spell lasts."""
        import pandas as pd

        sealed = self.path / trace.EVENTS_FILE
        if sealed.exists():
            table = trace.read_table(sealed)
        else:
            table = resolve_events(trace.read_parts(self.path / trace.EVENTS_FOLDER))
        frame: pd.DataFrame = table.to_pandas()
        frame["end_iteration"] = pd.array(table["end_iteration"].to_pylist(), dtype="Int64")
        return frame

    @cached_property
    def brief_spells(self) -> "pd.DataFrame":
        """Spells shorter than min_spell: kind, layer, layer_index, filter, spells (a count)."""
        import pandas as pd

        path = self.path / trace.BRIEF_SPELLS_FILE
        columns = ["kind", "layer", "layer_index", "filter", "spells"]
        return (
            trace.read_table(path).to_pandas() if path.exists() else pd.DataFrame(columns=columns)
        )

    @cached_property
    def feature_maps(self) -> tuple[FeatureMaps, ...]:
        """The snapshots, in order of iteration."""
        folder = self.path / FEATURE_MAPS_FOLDER
        paths = sorted(folder.glob("iteration-*.npz")) if folder.is_dir() else []
        return tuple(_read_feature_maps(path) for path in paths)

    def _norms(self, quantity: str, layer: str | None, window: str | None) -> "pd.DataFrame":
        import pandas as pd

        if layer is not None and layer not in self._layers:
            raise KeyError(f"no layer {layer!r} in {self.path}")
        value = trace.column_name(quantity, layer)
        extreme = trace.column_name(f"{quantity}_{window}", layer)
        wanted = ["iteration", value] + ([extreme] if window else [])
        tables = trace.read_parts(self.path / trace.NORMS_FOLDER, wanted)
        # A run of NaN alone is not stored: its width is that of the parts that have the column.
        widths = [table[value].type.list_size for table in tables if value in table.column_names]
        width = widths[0] if layer is None and widths else 0
        width = width if layer is None else self._layers[layer].filters
        parts, numbers = [], []
        for table in tables:
            # Where every iteration is stored, a window is that iteration alone.
            name = extreme if extreme in table.column_names else value
            numbers.append(table["iteration"].to_numpy())
            parts.append(
                trace.matrix(table[name])
                if name in table.column_names
                else np.full((table.num_rows, width), np.nan, dtype=np.float32)
            )
        values = np.concatenate(parts) if parts else np.empty((0, width), dtype=np.float32)
        index = np.concatenate(numbers) if numbers else np.empty(0, dtype=np.int64)
        return pd.DataFrame(values, index=pd.Index(index, name="iteration"))

    def _per_layer(self, column: str) -> "pd.DataFrame":
        import pandas as pd

        tables = trace.read_parts(self.path / trace.ITERATIONS_FOLDER, ["iteration", column])
        names = [layer.name for layer in self.layers]
        if not tables:
            return pd.DataFrame(columns=names, index=pd.Index([], name="iteration"))
        table = pa.concat_tables(tables)
        index = pd.Index(table["iteration"].to_numpy(), name="iteration")
        return pd.DataFrame(trace.matrix(table[column]), index=index, columns=names)


def load_run(path: str | Path) -> Run:
    """Load a run directory, finished or not.

    Raises RunDirectoryError when `path` is no run directory, or one of a newer pgt-diag.
    """
    return Run(Path(path))


def find_runs(path: Path) -> Iterator[Path]:
    """Yield `path` itself if it is a run directory, else those directly below it."""
    if (path / RUN_FILE).exists():
        yield path
    elif path.is_dir():
        yield from sorted(child for child in path.iterdir() if (child / RUN_FILE).exists())


def _read_info(path: Path) -> dict[str, Any]:
    file = path / RUN_FILE
    if not file.exists():
        raise RunDirectoryError(f"{path}: no run here ({RUN_FILE} is missing)")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        version = info["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{file}: damaged or unreadable: {error}") from None
    if version != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{file}: schema version {version}, and this pgt-diag reads {SCHEMA_VERSION}; "
            "use the pgt-diag that recorded it"
        )
    return dict(info)


def _read_feature_maps(path: Path) -> FeatureMaps:
    try:
        with np.load(path, allow_pickle=False) as file:
            return FeatureMaps(
                iteration=int(file["iteration"]),
                layer=str(file["layer"]),
                maps=file["maps"],
                images=file["images"],
                labels=tuple(str(label) for label in file["labels"]),
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RunDirectoryError(f"{path}: damaged or unreadable: {error}") from None
