"""A recorded run, loaded by anyone who reads it. `directory` has the writing side.

```
runs/<name>/
  run.json              schema version, configuration, environment, layers, status, overhead
  metrics.csv           one row per epoch; dead_filters: dead then, by `filters.deaths`
  trace/*.parquet       stored rows of norms, a list column per quantity and layer
  iterations/*.parquet  every iteration: loss, accuracy, lr, gradient norm, filters per state
  events.parquet        the event log (events/*.parquet until the run is finished)
  brief_spells.parquet  spells too short for the log, counted per filter (likewise)
  feature_maps/*.npz    feature maps of fixed images
  checkpoints/*.pt      what training goes on from, the newest two
  set-aside/            what was recorded after the checkpoint that a resumed run went on from
  .lock                 held by the process that writes here
```

Every file's content is checked against its SHA-256, which is in its name, in run.json, or (for
run.json) in itself.
"""

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgt_diag import storage, trace
from pgt_diag.config import RunConfig
from pgt_diag.directory import (
    FEATURE_MAPS_FOLDER,
    MAX_METRICS_BYTES,
    METRICS_FILE,
    RUN_FILE,
    what_is_left,
)
from pgt_diag.encoder import SCALARS, resolve_events
from pgt_diag.errors import ConfigurationError, RunDirectoryError
from pgt_diag.filters import EVENT_KINDS, unknown_since
from pgt_diag.reading import (
    MAX_COUNT,
    FeatureMaps,
    Layer,
    Status,
    check_columns,
    digests_of,
    is_locked,
    read_info,
    read_layers,
    read_metrics,
    read_snapshots,
)

if TYPE_CHECKING:
    import pandas as pd

_READ_ATTEMPTS = 5


class Run:
    """A recorded run, read only. Tables are read when asked for, a layer at a time.

    Safe on a stranger's directory: nothing is unpickled, no code is run. Raises
    RunDirectoryError, naming the file, for what is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        self.info = read_info(path)
        status = self.info.get("status")
        if status == "running" and not is_locked(path):
            message = "the process that recorded it was killed"
            self.info |= {"status": "interrupted", "message": message}
        elif status in ("interrupted", "failed") and is_locked(path):
            # A process goes on with it, and is still reading its data.
            self.info |= {"status": "running", "message": None}
        self.layers = read_layers(path, self.info.get("layers", []))
        self._by_name = {layer.name: layer for layer in self.layers}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r})"

    @property
    def status(self) -> Status:
        """How the run stands."""
        status: Status = self.info.get("status") or "failed"
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
        path = self.path / METRICS_FILE

        def read() -> bytes:
            try:
                return storage.read(path, MAX_METRICS_BYTES)
            except FileNotFoundError:
                return b""  # as it is before the end of the first epoch

        return read_metrics(self._vouched_for(METRICS_FILE, read), path)

    @cached_property
    def iterations(self) -> "pd.DataFrame":
        """Every iteration's loss, accuracy (percent), lr, gradient norms, clip coefficient."""
        import pandas as pd

        parts = self._rows(trace.ITERATIONS_FOLDER, ["iteration", *SCALARS])
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
        for part in self._rows(trace.ITERATIONS_FOLDER, ["iteration", *SCALARS], newest=True):
            for row in part.slice(max(0, part.num_rows - 1)).to_pylist():
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

        def parts() -> pa.Table:
            storage.check_no_link(self.path / trace.EVENTS_FOLDER)
            log = trace.read_parts(self.path / trace.EVENTS_FOLDER)
            self._check_tables(log, trace.EVENT_SCHEMA, trace.EVENTS_FOLDER)
            return resolve_events(log)

        table = self._sealed_table(trace.EVENTS_FILE, parts)
        self._check_tables([table], trace.EVENT_SCHEMA, trace.EVENTS_FILE)
        self._check_filters(table, trace.EVENTS_FILE)
        self._check_spells(table)
        frame: pd.DataFrame = table.to_pandas()
        frame["end_iteration"] = pd.array(table["end_iteration"].to_pylist(), dtype="Int64")
        return frame

    @cached_property
    def unknown_spells(self) -> "pd.DataFrame":
        """Rows as of `events`, for as long as a state may have held or not: nobody saw it.

        Kind "silent" where no hook could read the layer's map; "zero_gradient" from where on a
        filter's gradient norm is NaN to the end of the run: a frozen weight has no gradient, and a
        parametrised one not that of the convolution.
        """
        import pandas as pd

        rows = [
            (kind, layer.name, layer.index, filter_, int(start), pd.NA)
            for layer in self.layers
            for kind, starts in self._unknown_of(layer).items()
            for filter_, start in enumerate(starts)
            if start >= 0
        ]
        table = pd.DataFrame(rows, columns=trace.EVENT_SCHEMA.names)
        return table.astype({"end_iteration": "Int64"})

    def _unknown_of(self, layer: Layer) -> dict[str, NDArray[np.int64]]:
        """Return, by kind, since when each filter's state is unknown; −1 where it is known."""
        unknown = {} if layer.seen else {"silent": np.zeros(layer.filters, dtype=np.int64)}
        if layer.name in self._without_gradient:
            norms = self.gradient_norms(layer.name)
            unknown["zero_gradient"] = unknown_since(norms.to_numpy(), norms.index.to_numpy())
        return unknown

    @cached_property
    def _without_gradient(self) -> frozenset[str]:
        """The layers some of whose newest stored gradient norms are NaN."""
        names = {trace.column_name("gradient_norm", each.name): each.name for each in self.layers}
        found = []
        for table in self._rows(trace.NORMS_FOLDER, ["iteration", *names], newest=True):
            last = table.slice(max(0, table.num_rows - 1))
            known = {
                column
                for column in names
                if column in last.column_names and not np.isnan(trace.matrix(last[column])).any()
            }
            found += [names[column] for column in names if column not in known]
        return frozenset(found)

    @cached_property
    def brief_spells(self) -> "pd.DataFrame":
        """Spells shorter than min_spell: kind, layer, layer_index, filter, spells (a count)."""
        import pandas as pd

        folder = self.path / trace.BRIEF_SPELLS_FOLDER
        storage.check_no_link(folder)
        empty = trace.BRIEF_SPELLS_SCHEMA.empty_table()
        table = self._sealed_table(
            trace.BRIEF_SPELLS_FILE, lambda: pa.concat_tables([empty, *trace.read_parts(folder)])
        )
        self._check_tables([table], trace.BRIEF_SPELLS_SCHEMA, trace.BRIEF_SPELLS_FILE)
        self._check_filters(table, trace.BRIEF_SPELLS_FILE)
        frame: pd.DataFrame = table.to_pandas()
        return frame

    @cached_property
    def feature_maps(self) -> tuple[FeatureMaps, ...]:
        """The snapshots, in order of iteration, and of layers within one."""
        folder = self.path / FEATURE_MAPS_FOLDER
        storage.check_no_link(folder)
        paths = sorted(folder.glob("iteration-*.npz")) if folder.is_dir() else []
        return read_snapshots(paths, self.layers)

    def _vouched_for(self, name: str, read: Callable[[], bytes]) -> bytes:
        """Return a file's content, once it is one that run.json has the fingerprint of."""
        for _ in range(_READ_ATTEMPTS):
            digests = digests_of(read_info(self.path), name)
            data = read()
            if storage.fingerprint(data) in digests or not (data or digests):
                return data
            # The run may go on, and have written both anew in between: look again.
        raise storage.damaged(self.path / name)

    def _sealed_table(self, name: str, parts: Callable[[], pa.Table]) -> pa.Table:
        """Return a table that is one file once the run has ended, and parts before."""
        for _ in range(_READ_ATTEMPTS):
            digests = digests_of(read_info(self.path), name)
            if digests:
                try:
                    return trace.read_table(self.path / name, digests)
                except FileNotFoundError:
                    raise RunDirectoryError(f"{self.path / name}: is missing") from None
                except KeyError as error:
                    raise RunDirectoryError(f"{self.path / name}: damaged: {error}") from None
            try:
                table = parts()
            except (KeyError, pa.ArrowException) as error:
                raise RunDirectoryError(f"{self.path}: {name}: damaged: {error}") from None
            if not digests_of(read_info(self.path), name):
                return table
        raise AssertionError

    def _check_tables(self, tables: list[pa.Table], schema: pa.Schema, name: str) -> None:
        for table in tables:
            if not table.schema.equals(schema):
                raise RunDirectoryError(f"{self.path / name}: not the columns that belong there")

    def _check_filters(self, table: pa.Table, name: str) -> None:
        """Raise RunDirectoryError unless every row names a state of a filter of this run."""
        layer, index = table["layer_index"].to_numpy(), table["filter"].to_numpy()
        sizes = np.array([each.filters for each in self.layers], dtype=np.int64)
        known = np.isin(table["kind"].to_numpy(), EVENT_KINDS) & (layer >= 0)
        known &= (layer < len(sizes)) & (index >= 0)
        if known.all():
            names = np.array([each.name for each in self.layers], dtype=object)
            known &= (index < sizes[layer]) & (names[layer] == table["layer"].to_numpy())
        if not known.all():
            raise RunDirectoryError(f"{self.path / name}: names a state or filter that is not here")

    def _check_spells(self, table: pa.Table) -> None:
        """Raise RunDirectoryError unless every spell begins, and ends later if at all."""
        start, end = table["start_iteration"], table["end_iteration"].fill_null(MAX_COUNT)
        first, last = start.fill_null(-1).to_numpy(), end.to_numpy()
        if ((first < 0) | (last <= first) | (last > MAX_COUNT)).any():
            raise RunDirectoryError(f"{self.path / trace.EVENTS_FILE}: a spell cannot be")

    def _rows(self, folder: str, columns: list[str], *, newest: bool = False) -> list[pa.Table]:
        """Read columns of the parts in a folder; RunDirectoryError unless they fit the layers."""
        storage.check_no_link(self.path / folder)
        try:
            tables = trace.read_parts(self.path / folder, columns, newest=newest)
        except KeyError as error:  # as Arrow tells of two columns of one name
            raise RunDirectoryError(f"{self.path / folder}: damaged: {error}") from None
        last = -1
        for table in tables:
            check_columns(table, self.path / folder)
            for name in (*SCALARS, "iteration"):
                flat = name in table.column_names and not pa.types.is_nested(table[name].type)
                if name in columns and not flat:
                    raise RunDirectoryError(f"{self.path / folder}: column {name} is missing")
            for field in table.schema:
                flat = field.name in (*SCALARS, "iteration")
                if not flat and not pa.types.is_fixed_size_list(field.type):
                    raise RunDirectoryError(f"{self.path / folder}: {field.name} has no lists")
            numbers = table["iteration"].to_numpy()
            steps = np.diff(numbers, prepend=last)
            if (steps <= 0).any() or numbers[-1:].max(initial=0) >= MAX_COUNT:
                raise RunDirectoryError(f"{self.path / folder}: iterations are not in order")
            if folder == trace.ITERATIONS_FOLDER and not newest and (steps != 1).any():
                gap = int(numbers[steps != 1][0])
                raise RunDirectoryError(f"{self.path / folder}: no iteration {gap - 1:,} is there")
            last = numbers[-1] if len(numbers) else last
        return tables

    def _norms(self, quantity: str, layer: str | None, window: str | None) -> "pd.DataFrame":
        import pandas as pd

        if layer is not None and layer not in self._by_name:
            raise KeyError(f"no layer {layer!r} in {self.path}")
        if window not in (None, "min", "max"):
            raise ValueError(f"no window {window!r}; choose one of min, max, None")
        value = trace.column_name(quantity, layer)
        extreme = trace.column_name(f"{quantity}_{window}", layer)
        wanted = ["iteration", value] + ([extreme] if window else [])
        tables = self._rows(trace.NORMS_FOLDER, wanted)
        # A run of NaN alone is not stored: its width is that of the parts that have the column.
        widths = [table[value].type.list_size for table in tables if value in table.column_names]
        width = widths[0] if layer is None and widths else 0
        width = width if layer is None else self._by_name[layer].filters
        kinds = {table[value].type.value_type for table in tables if value in table.column_names}
        if any(found != width or not found for found in widths) or kinds - {pa.float32()}:
            raise RunDirectoryError(
                f"{self.path / trace.NORMS_FOLDER}: {value} is not of float32, or has another width"
            )
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

        tables = self._rows(trace.ITERATIONS_FOLDER, ["iteration", column])
        names = [layer.name for layer in self.layers]
        for table in tables:
            if column not in table.column_names or table[column].type.list_size != len(names):
                folder = self.path / trace.ITERATIONS_FOLDER
                raise RunDirectoryError(f"{folder}: {column} is not there for every layer")
        if not tables:
            return pd.DataFrame(columns=names, index=pd.Index([], name="iteration"))
        table = pa.concat_tables(tables)
        index = pd.Index(table["iteration"].to_numpy(), name="iteration")
        return pd.DataFrame(trace.matrix(table[column]), index=index, columns=names)


def load_run(path: str | Path) -> Run:
    """Load a run directory, finished or not.

    Raises RunDirectoryError when `path` is no run directory, or one of a newer pgt-diag, and
    ConfigurationError when it is no path at all.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(f"path is {path!r:.100}; it must be that of a run directory")
    return Run(Path(path))


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run directories that these are, or hold directly, each once, in order.

    One that has lost its run.json is among them: whoever reads it says that it is damaged.

    Raises RunDirectoryError for a path where there is none, and for a link to nothing.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for run in _runs_at(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def runs_in(folder: Path) -> list[Path]:
    """Return the runs that a folder holds by now, damaged ones among them; maybe none."""
    try:
        return [run for run in find_runs([folder]) if run != folder]
    except RunDirectoryError:
        return []


def _runs_at(path: Path) -> list[Path]:
    _check_target(path)
    left = what_is_left(path)
    if RUN_FILE in left:
        return [path]
    if not path.is_dir():
        reason = "is a file, and a run is a directory" if path.exists() else "no such directory"
        raise RunDirectoryError(f"{path}: {reason}")
    runs = []
    for child in sorted(path.iterdir()):
        _check_target(child)
        runs += [child] if what_is_left(child) else []
    if not runs and not left:
        raise RunDirectoryError(f"{path}: no run here, nor in its folders")
    return runs or [path]


def _check_target(path: Path) -> None:
    # Editors lock files by hidden links to nothing.
    if path.is_symlink() and not path.exists() and not path.name.startswith("."):
        raise RunDirectoryError(f"{path}: is a link to '{path.readlink()}', which is not there")
