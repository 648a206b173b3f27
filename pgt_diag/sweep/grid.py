"""Which runs a sweep is made of: presets and TOML grids, and the name of each run's directory.

Standard library only, so that the command line can list every choice without importing torch.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from pgt_diag.config import (
    RESUMABLE_WITH,
    Norm,
    Preset,
    RunConfig,
    Schedule,
    check_keys,
    coerce,
    compose,
    must_be_one_of,
    parse_toml,
)
from pgt_diag.errors import ConfigurationError
from pgt_diag.paper import FIGURE_2, TABLE_1, TABLE_2, TABLE_3, TABLE_3_MODEL


class SweepPreset(StrEnum):
    """Named sweeps: the paper's tables and Fig. 2 with its recipe, and Table 2's methods on digits.

    Rows that two of them share are one run where they share a --sweep-dir.
    """

    TABLE1 = "table1"
    TABLE2 = "table2"
    TABLE2_SMOKE = "table2-smoke"
    TABLE3 = "table3"
    FIG2 = "fig2"


@dataclass(frozen=True)
class Row:
    """One run of a sweep."""

    config: RunConfig
    preset: Preset

    @cached_property
    def name(self) -> str:
        """The run's directory: readable, and another one for whatever makes another result."""
        config = self.config
        alpha = f"-a{config.alpha:g}" if config.method.uses_pgt else ""
        text = json.dumps(deciding(config), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        network = ""
        if config.norm is Norm.BATCH:
            network = re.sub(r"[^\w.]", "_", config.model.rpartition("/")[2])[:40] + "-"
        return f"{network}{config.method}{alpha}-b{config.batch_size}-s{config.seed}-{digest}"

    def anywhere(self) -> "Row":
        """Return the row for a process of any working directory: its data's path is absolute."""
        data = self.config.data
        if data is None or data.startswith("~"):
            return self
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, data=str(Path(data).absolute()))
        )

    def command(self, directory: Path, processes: int = 1) -> list[str]:
        """Return the `pgt-diag train` command that makes this run, or goes on with it."""
        start = compose(self.preset, {}, {})[0]
        words = ["pgt-diag", "train", "--preset", str(self.preset)]
        for field in dataclasses.fields(RunConfig):
            value = getattr(self.config, field.name)
            # A preset's warm-up is cut to a shorter run; only one that is named is left alone.
            if value != getattr(start, field.name) or field.name == "warmup_epochs":
                words += _option(field.name, value)
        words += ["--nproc", str(processes)] if processes > 1 else []
        return [*words, "--run-dir", str(directory), "--resume", "auto"]


@dataclass(frozen=True)
class Grid:
    """A sweep's rows, each once."""

    rows: tuple[Row, ...]

    def per_process(self, processes: int) -> "Grid":
        """Return the grid whose batch sizes are what each of so many processes gets in this one."""
        rows = []
        for row in self.rows:
            size = row.config.batch_size * processes
            config = dataclasses.replace(row.config, batch_size=size)
            rows.append(Row(config, row.preset))
        return Grid(tuple(rows))

    @property
    def lr_rule(self) -> str:
        """The rule that the learning rates follow across batch sizes; several where rows differ."""
        return " and ".join(sorted({row.config.lr_rule for row in self.rows}))

    @property
    def rule(self) -> str:
        """The learning-rate rule, in words, with the rates it gives."""
        rates: dict[int, set[float]] = {}
        for row in self.rows:
            rates.setdefault(row.config.batch_size, set()).add(row.config.peak_lr)
        shown = "; ".join(
            f"batch {size}: lr {', '.join(f'{lr:g}' for lr in sorted(rates[size]))}"
            for size in sorted(rates)
        )
        bases = sorted({size for row in self.rows if (size := row.config.lr_base_batch)})
        base = f" in the batch size, from {', '.join(map(str, bases))}" if bases else ""
        return f"{self.lr_rule}{base} ({shown})"


def deciding(config: RunConfig) -> dict[str, Any]:
    """Return the values that decide a run's result, and not only where or how fast it is made."""
    values = config.to_mapping()
    return {key: value for key, value in values.items() if key not in RESUMABLE_WITH}


def build_grid(
    preset: SweepPreset | None = None,
    file: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    source: str = "",
) -> Grid:
    """Return a sweep's rows: options before the file, the file before the preset's values.

    A list is an axis; the axes are crossed. Each table `row` is a grid of its own, over all that
    is given outside it; options replace also what a row says. Keys are RunConfig's, and `preset`
    (the recipe that `pgt-diag train` has under that name).

    Raises ConfigurationError, naming `source`, the row and the key, for what cannot be used.
    """
    options = dict(options or {})
    values = {**(_PRESETS[preset] if preset else {}), **(file or {}), **options}
    try:
        check_keys(values, also=_KEYS)
        recipe = _recipe(values.pop("preset", None))
        rows = _rows(values.pop("row", [{}]))
    except ConfigurationError as error:
        raise _located(error, source) from None
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        try:
            check_keys(row)
            row_values = {key: value for key, value in row.items() if key not in options}
            for point in _points({**values, **row_values}):
                config, used = compose(recipe, {}, point)
                made = Row(_without_effectless(config), used)
                # Crossed axes name a run twice where a method does not use what varies.
                found.setdefault(made.name, made)
        except ConfigurationError as error:
            place = f"row {number}" if "row" in (file or {}) else ""
            raise _located(error, source, place) from None
    return Grid(tuple(found.values()))


def read_grid(path: Path) -> dict[str, Any]:
    """Read a TOML grid for `build_grid`; dashes in keys are underscores.

    Raises ConfigurationError, naming the file, when it is not TOML, or gives a key twice.
    """
    values = parse_toml(path)
    try:
        values = _underscored(values)
        if isinstance(values.get("row"), list):
            values["row"] = [
                _underscored(row) if isinstance(row, dict) else row for row in values["row"]
            ]
    except ConfigurationError as error:
        raise _located(error, str(path)) from None
    return values


def parse_value(text: str) -> tuple[str, Any]:
    """Return the key and value of KEY=VALUE; the value is TOML, or text where it is not."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"`set=...` is {text!r}; write KEY=VALUE")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    return key.replace("-", "_"), parsed


_KEYS = ("preset", "row")
_MAX_POINTS = 100_000
_SMOKE_SCALE = 8
"""Digits are few: batches of 32, 64 and 128 stand for the paper's 256, 512 and 1024."""


def _table2(scale: int) -> list[dict[str, Any]]:
    rows = []
    for batch_size, method, alpha, *_ in TABLE_2:
        row: dict[str, Any] = {"method": str(method), "batch_size": batch_size // scale}
        rows.append(row if math.isnan(alpha) else {**row, "alpha": alpha})
    return rows


def _batch_normalised(keys: tuple[str, ...], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Return a sweep of the paper's recipe, at its batch size, over networks with batch norm."""
    found = []
    for row in rows:
        values = dict(zip(keys, row, strict=False))
        if math.isnan(values["alpha"]):
            del values["alpha"]
        found.append(values)
    return {"preset": "paper", "norm": "batch", "seed": [0, 1, 2], "row": found}


_PRESETS: dict[SweepPreset, dict[str, Any]] = {
    SweepPreset.TABLE1: _batch_normalised(("model", "schedule", "method", "alpha"), TABLE_1),
    SweepPreset.TABLE3: _batch_normalised(
        ("schedule", "label_smoothing", "method", "alpha"), TABLE_3
    )
    | {"model": TABLE_3_MODEL},
    SweepPreset.FIG2: _batch_normalised(("model", "method", "alpha", "epochs"), FIGURE_2),
    SweepPreset.TABLE2: {"preset": "paper", "seed": [0, 1, 2, 3, 4], "row": _table2(1)},
    SweepPreset.TABLE2_SMOKE: {"preset": "smoke", "seed": [0, 1, 2], "row": _table2(_SMOKE_SCALE)},
}


def _points(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the axes, the first axis slowest."""
    axes = []
    for key, value in values.items():
        listed = isinstance(value, list)
        if key == "step_epochs":  # itself a list: an axis of it is a list of lists
            listed = listed and any(isinstance(item, list) for item in value)
        if listed and not value:
            raise ConfigurationError(f"{key} is []; name at least one value")
        axes.append([(key, coerce(key, each)) for each in (value if listed else [value])])
    if (count := math.prod(map(len, axes))) > _MAX_POINTS:
        raise ConfigurationError(f"its axes make {count:,} runs; {_MAX_POINTS:,} are the most")
    for point in itertools.product(*axes):
        yield dict(point)


def _without_effectless(config: RunConfig) -> RunConfig:
    """Put the options that the method or the schedule does not use at their defaults."""
    unused = [] if config.method.uses_pgt else ["alpha"]
    unused += [] if config.method.uses_gc else ["clip_norm"]
    unused += [] if config.method.uses_agc else ["agc_clip_factor", "agc_eps", "agc_classifier"]
    unused += [] if config.schedule is Schedule.COSINE else ["warmup_prefix", "cooldown_epochs"]
    return dataclasses.replace(config, **{key: getattr(RunConfig, key) for key in unused})


def _recipe(name: Any) -> Preset | None:
    if name is not None and name not in list(Preset):
        raise ConfigurationError(f"preset is {name!r}; {must_be_one_of(Preset)}")
    return None if name is None else Preset(name)


def _rows(rows: Any) -> list[dict[str, Any]]:
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ConfigurationError(f"row is {rows!r}; write tables, each under [[row]]")
    return rows


def _option(key: str, value: Any) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", ",".join(map(str, value))]
    return [f"--{flag}", str(value)]


def _underscored(values: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in named:
            raise ConfigurationError(f"{name} is given twice, as '{key}' too")
        named[name] = value
    return named


def _located(error: ConfigurationError, *places: str) -> ConfigurationError:
    return ConfigurationError(": ".join(filter(None, (*places, str(error)))))
