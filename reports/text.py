"""Words and numbers for people: labels of runs, formats, and text made safe for where it goes."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pgt_diag.config import Method
from pgt_diag.filters import DeathCounts
from pgt_diag.text import printable
from reports.source import Run

METHOD_NAMES = {
    Method.BASELINE: "Baseline",
    Method.GC: "GC",
    Method.AGC: "AGC",
    Method.PGT: "PGT",
    Method.GC_PGT: "GC+PGT",
    Method.AGC_PGT: "AGC+PGT",
}
"""The paper's spelling, in the order of its Table 2."""

# These could end the script element.
_ISLAND_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def plotly_text(text: object) -> str:
    """Return text that plotly shows as it is: titles and names interpret tags and entities."""
    return html.escape(printable(text)).replace("%{", "%\u2060{").replace("$", "＄")


def json_island(data: Any) -> str:
    """Return JSON that is safe inside a script element, with NaN as null."""
    return json.dumps(_finite(data), separators=(",", ":")).translate(_ISLAND_ESCAPES)


def ascii_script(text: str) -> str:
    """Return JavaScript that has other signs only in strings and comments, as pure ASCII."""
    return "".join(sign if sign.isascii() else json.dumps(sign)[1:-1] for sign in text)


def ascii_style(text: str) -> str:
    """Return CSS that has other signs only in strings and comments, as pure ASCII."""
    return "".join(sign if sign.isascii() else f"\\{ord(sign):x} " for sign in text)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number with thousands separators and a real minus; '–' for a missing one."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def share(part: float, whole: float) -> str:
    """Return a percentage with enough digits not to read as zero."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    return f"{percent:.2f} %" if 0 < percent < 1 else f"{percent:.1f} %"


def dead_share(dead: int, unknown: int, filters: int) -> str:
    """Return which share of a layer is dead: '0', '25.0 %', or 'unknown' where that is not told."""
    if unknown:
        return "unknown"
    return share(dead, filters) if dead else "0"


def plural(count: int, noun: str) -> str:
    """Return '1 filter', '4,800 filters'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def runs_of_seeds(runs: int, seeds: int) -> str:
    """Return '3 runs', or '3 runs of one seed': the same seed again is no further observation."""
    told = plural(runs, "run")
    if seeds == runs:
        return told
    return f"{told} of {plural(seeds, 'seed') if seeds > 1 else 'one seed'}"


def join(words: Sequence[str]) -> str:
    """Return 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def layer_name(name: object) -> str:
    """Return a layer's name as a sentence takes it: that of a Sequential's layer is a number."""
    shown = printable(name)
    return f"module {shown}" if re.fullmatch(r"[0-9.]+", shown) else shown


def death_counts(counts: DeathCounts) -> str:
    """Return what relates the numbers of deaths, of filters that died, revivals and the dead."""
    last = "last" if counts.dead != 1 else "lasts"
    return (
        f"{plural(counts.deaths, 'death')} of {plural(counts.died, 'filter')} in all: "
        f"{counts.revivals:,} ended in a revival, {counts.dead:,} {last} to the end"
    )


def method_label(run: Run) -> str:
    """Return 'PGT (α 0.25)', or the run's name when it has no configuration."""
    if run.config is None:
        return printable(run.name)
    name = METHOD_NAMES[run.config.method]
    return f"{name} (α {run.config.alpha:g})" if run.config.method.uses_pgt else name


_TELLING = {
    "model": "{}",
    "schedule": "{}",
    "label_smoothing": "smoothing {:g}",
    "epochs": "{} epochs",
    "batch_size": "batch {}",
    "seed": "seed {}",
}
"""What tells runs apart beside the method, and how a label says it."""


def _by_what_differs(run: Run, runs: Sequence[Run]) -> str:
    """Return a label of the method and of what not all of the runs share."""
    if run.config is None:
        return ""
    configs = [each.config for each in runs if each.config is not None]
    values = [
        told.format(getattr(run.config, key))
        for key, told in _TELLING.items()
        if len({getattr(config, key) for config in configs}) > 1
    ]
    return printable(", ".join([method_label(run), *values]).replace("timm/", ""))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return a distinct label for each run: as short as tells them apart."""
    ways: list[Callable[[Run], str]] = [
        method_label,
        lambda run: f"{method_label(run)}, batch {run.config.batch_size}" if run.config else "",
        lambda run: f"{method_label(run)}, seed {run.config.seed}" if run.config else "",
        lambda run: (
            f"{method_label(run)}, batch {run.config.batch_size}, seed {run.config.seed}"
            if run.config
            else ""
        ),
        lambda run: _by_what_differs(run, runs),
        lambda run: printable(run.name),
    ]
    for way in ways:
        labels = [way(run) or printable(run.name) for run in runs]
        if len(set(labels)) == len(labels):
            return labels
    counts: Counter[str] = Counter()
    distinct = []
    for label in labels:
        counts[label] += 1
        distinct.append(f"{label} #{counts[label]}")
    return distinct
