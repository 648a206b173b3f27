"""Fig. 3: norm against iteration, a line for every filter, panels lettered as in the paper."""

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pgt_diag.errors import ConfigurationError
from pgt_diag.filters import EVENT_KINDS, MIN_DEATH_WINDOW
from pgt_diag.text import printable
from reports.lines import PackedLines, pack, thin
from reports.source import Layer
from reports.summary import RunSummary
from reports.text import layer_name

DEFAULT_LAYERS: tuple[int | str, ...] = (11, 19)
"""The layers of the paper's Fig. 3, counted from 0 over all convolutions."""

PAPER_CONVOLUTIONS = 20

MAIN_ROWS, FOLD_ROWS = 1500, 400
"""Most rows of a panel of Fig. 3, and of one behind the fold."""

LEAST_ROWS = 16
"""Fewest rows of a panel, however many runs there are."""

PAGE_BYTES = 8_000_000
"""What a page of up to 20 runs may weigh."""

_BUNDLE_BYTES, _RUN_BYTES = 700_000, 190_000
"""What a page has besides lines: plotly, scripts and tables once, and for each run of a hundred
epochs its maps, events, deaths and curves."""

_MOST_LINE_BYTES, _LEAST_LINE_BYTES, _MAIN_SHARE = 5_300_000, 1_500_000, 0.47

MAX_EVENTS = 25_000
"""Most events the panels carry for their hover texts, and those behind the fold as many again; the
longest are kept."""


@dataclass(frozen=True)
class Panel:
    """One panel's data: what to draw and what the hover says.

    norms: index iteration, a column per filter. deaths: filter, iteration, revival_iteration,
    cause. events: kind, filter, start_iteration, end_iteration. `top` and `bottom`, the largest
    and the smallest norm, are shared by a row's panels. `stored` is the number of rows that the
    run has, of which `norms` may hold fewer. `cut` says that events were left out, `apart` that
    the run diverged and the panel has a range of its own. `window` is how long a filter must be
    dead to count, `unknown` the filters of which nobody can tell whether they died.
    """

    letter: str
    run: int
    subject: str
    unit: str
    norms: pd.DataFrame
    deaths: pd.DataFrame
    events: pd.DataFrame
    top: float = 1.0
    bottom: float = 0.0
    message: str = ""
    stored: int = 0
    cut: bool = False
    apart: bool = False
    window: int = MIN_DEATH_WINDOW
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedPanel:
    """A panel ready for the page."""

    panel: Panel
    lines: PackedLines


def resolve_layers(layers: Sequence[Layer], wanted: Sequence[int | str]) -> list[Layer | None]:
    """Return the layers asked for by the paper's index or by name; None where there is none.

    The default, 11 and 19 of 20, becomes the same depths of a network with another number of
    convolutions: the last one and the one at 58 %. Squeeze-and-excitation's are not counted there:
    their maps are gates of one pixel.
    """
    if not layers:
        return [None for _ in wanted]
    if tuple(wanted) == DEFAULT_LAYERS and len(layers) != PAPER_CONVOLUTIONS:
        deep = [layer for layer in layers if ".se." not in layer.name] or layers
        deepest = len(deep) - 1
        places = dict.fromkeys((round(deepest * 11 / 19), deepest))
        return [deep[place] for place in places]
    known: dict[int | str, Layer] = {}
    for layer in layers:
        known[layer.index] = known[str(layer.index)] = known[layer.name] = layer
    return [known.get(key) for key in wanted]


def fig3(
    summaries: Sequence[RunSummary], wanted: Sequence[int | str] = DEFAULT_LAYERS
) -> list[list[Panel]]:
    """Return Fig. 3: a row of panels for each layer and one for the GAP features, a column per run.

    For a baseline and a PGT run the letters are the paper's: (a) (b) the first layer, (c) (d) the
    second, (e) (f) the pooled features. Raises ConfigurationError when no run has a layer asked
    for.
    """
    resolved = [resolve_layers(summary.run.layers, wanted) for summary in summaries]
    count = max((len(each) for each in resolved), default=0)
    # The pooled features are about as many as the last layer's filters.
    lines = sum(
        sum(layer.filters for layer in (*chosen, *summary.run.layers[-1:]) if layer)
        for chosen, summary in zip(resolved, summaries, strict=True)
    )
    most = affordable_rows(lines, MAIN_ROWS, line_bytes(len(summaries))[0])
    rows: list[list[Panel]] = []
    for place in range(count):
        chosen = [each[place] if place < len(each) else None for each in resolved]
        if all(layer is None for layer in chosen) and any(each.run.layers for each in summaries):
            raise ConfigurationError(_no_such_layer(wanted[place], summaries))
        rows.append([_layer_panel(i, s, chosen[i], most) for i, s in enumerate(summaries)])
    rows.append([_gap_panel(i, summary, most) for i, summary in enumerate(summaries)])
    return _lettered(_with_longest_events(rows, MAX_EVENTS))


def other_layers(
    summaries: Sequence[RunSummary], shown: Sequence[Sequence[Panel]]
) -> list[list[Panel]]:
    """Return the panels of every layer that Fig. 3 does not show: a row per layer name."""
    have = {panel.subject for row in shown for panel in row}
    names = dict.fromkeys(layer.name for summary in summaries for layer in summary.run.layers)
    lines = sum(summary.filters for summary in summaries)
    most = affordable_rows(lines, FOLD_ROWS, line_bytes(len(summaries))[1])
    rows = []
    for name in names:
        chosen = [
            next((layer for layer in summary.run.layers if layer.name == name), None)
            for summary in summaries
        ]
        row = [_layer_panel(i, s, chosen[i], most) for i, s in enumerate(summaries)]
        if not have & {panel.subject for panel in row}:
            rows.append(_shared_range(row))
    return _with_longest_events(rows, MAX_EVENTS)


def pack_panels(
    rows: Sequence[Sequence[Panel]], most_rows: int, most_bytes: int
) -> list[list[PackedPanel]]:
    """Pack the panels' lines, with fewer rows of each where all would weigh too much."""
    lines = sum(panel.norms.shape[1] for row in rows for panel in row)
    kept = affordable_rows(lines, most_rows, most_bytes)
    for _ in range(3):
        packed = [
            [PackedPanel(panel, pack(thin(panel.norms, kept).to_numpy())) for panel in row]
            for row in rows
        ]
        size = sum(len(each.lines.data) for row in packed for each in row)
        if size <= most_bytes or kept <= LEAST_ROWS:
            break
        kept = max(LEAST_ROWS, int(kept * 0.97 * most_bytes / size))
    return [
        [
            PackedPanel(
                dataclasses.replace(each.panel, norms=thin(each.panel.norms, kept)), each.lines
            )
            for each in row
        ]
        for row in packed
    ]


def line_bytes(runs: int) -> tuple[int, int]:
    """Return what the lines of Fig. 3, and of the layers behind the fold, may weigh as base64.

    Less where there are many runs, so that the whole page stays within PAGE_BYTES.
    """
    left = PAGE_BYTES - _BUNDLE_BYTES - _RUN_BYTES * runs
    both = int(np.clip(left, _LEAST_LINE_BYTES, _MOST_LINE_BYTES))
    main = int(_MAIN_SHARE * both)
    return main, both - main


def affordable_rows(lines: int, most_rows: int, most_bytes: int) -> int:
    """Return how many rows of so many lines can be worth reading into memory at all.

    A value hardly ever packs into less than a third of a byte.
    """
    return int(np.clip(most_bytes / (0.33 * max(1, lines)), LEAST_ROWS, most_rows))


def _layer_panel(run: int, summary: RunSummary, layer: Layer | None, rows: int) -> Panel:
    if layer is None:
        return _empty(run, "no such layer", "this run's network has no such layer")
    subject = f"layer {layer.index} filters · {layer_name(layer.name)}"
    norms = summary.run.weight_norms(layer.name)
    if norms.empty:
        return _empty(run, subject, "no row is stored yet")
    lowest = summary.run.weight_norms(layer.name, window="min")
    deaths = summary.deaths[summary.deaths["layer"] == layer.name]
    undecided = summary.undecided
    unknown = undecided.loc[undecided["layer"] == layer.name, "filter"]
    events = summary.run.events
    return Panel(
        letter="",
        run=run,
        subject=subject,
        unit="filter",
        norms=thin(norms, rows, lowest),
        stored=len(norms),
        deaths=deaths[["filter", "iteration", "revival_iteration", "cause"]],
        events=_hovered(events[events["layer"] == layer.name]),
        top=_highest(norms),
        bottom=_lowest(norms),
        apart=summary.run.status == "diverged",
        window=summary.window,
        unknown=tuple(int(filter_) for filter_ in unknown),
    )


def _gap_panel(run: int, summary: RunSummary, rows: int) -> Panel:
    norms = summary.run.gap_norms()
    if norms.empty:
        return _empty(run, "GAP features", "no pooled features are recorded")
    return Panel(
        letter="",
        run=run,
        subject="GAP features",
        unit="feature",
        norms=thin(norms, rows, summary.run.gap_norms(window="min")),
        stored=len(norms),
        deaths=silent_features(norms, summary.window),
        events=_NO_EVENTS,
        top=_highest(norms),
        bottom=_lowest(norms),
        apart=summary.run.status == "diverged",
        window=summary.window,
    )


def silent_features(norms: pd.DataFrame, window: int) -> pd.DataFrame:
    """Return the features exactly 0 from some stored row to the last, for at least `window`.

    Columns as `pgt_diag.filters.deaths` without the layer; the iteration is that of the first
    stored row, so late by at most the recording interval.
    """
    zero = norms.to_numpy() == 0
    # Rows of zeros at the end of each column: where, read backwards, the first non-zero stands.
    tail = np.where(zero.all(axis=0), len(zero), np.argmin(zero[::-1], axis=0))
    feature = np.flatnonzero(tail > 0)
    start = norms.index.to_numpy()[len(zero) - tail[feature]]
    lasting = norms.index[-1] - start >= window
    table = pd.DataFrame({"filter": feature[lasting], "iteration": start[lasting]})
    table["revival_iteration"] = pd.array([pd.NA] * len(table), dtype="Int64")
    table["cause"] = "silent"
    return table.sort_values("iteration", ignore_index=True)


_NO_EVENTS = pd.DataFrame(
    {"kind": [], "filter": [], "start_iteration": [], "end_iteration": []}
).astype({"end_iteration": "Int64"})
_NO_DEATHS = pd.DataFrame({"filter": [], "iteration": [], "revival_iteration": [], "cause": []})


def _empty(run: int, subject: str, message: str) -> Panel:
    return Panel(
        "", run, subject, "filter", pd.DataFrame(), _NO_DEATHS, _NO_EVENTS, message=message
    )


def _highest(norms: pd.DataFrame) -> float:
    values = norms.to_numpy()
    return float(np.max(values, where=np.isfinite(values), initial=0.0)) or 1.0


def _lowest(norms: pd.DataFrame) -> float:
    values = norms.to_numpy()
    low = np.min(values, where=np.isfinite(values), initial=np.inf)
    return float(low) if np.isfinite(low) else 0.0


def _hovered(events: pd.DataFrame) -> pd.DataFrame:
    known = events["kind"].isin(EVENT_KINDS)
    return events.loc[known, ["kind", "filter", "start_iteration", "end_iteration"]]


def _with_longest_events(rows: Sequence[Sequence[Panel]], most: int) -> list[list[Panel]]:
    """Leave out the shortest events of all panels where there are more than `most`."""
    lengths = [_lengths(panel) for row in rows for panel in row]
    everything = np.concatenate([*lengths, np.empty(0)])
    if len(everything) <= most:
        return [list(row) for row in rows]
    # Strictly longer than the longest one left out: ties must not overflow the budget.
    limit = np.partition(everything, len(everything) - most - 1)[len(everything) - most - 1]
    left = iter(lengths)
    return [
        [
            dataclasses.replace(
                panel,
                events=panel.events[(kept := next(left) > limit)],
                cut=not kept.all(),
            )
            for panel in row
        ]
        for row in rows
    ]


def _lengths(panel: Panel) -> NDArray[np.float64]:
    """Return how long each of a panel's events lasted, (events,)."""
    end = panel.norms.index[-1] + 1 if len(panel.norms) else 0
    length = panel.events["end_iteration"].fillna(end) - panel.events["start_iteration"]
    return length.to_numpy(np.float64)


def _shared_range(row: Sequence[Panel]) -> list[Panel]:
    """Give a row's panels one range; a diverged run keeps its own, or it would flatten the rest."""
    shared = [panel for panel in row if not panel.message and not panel.apart]
    top = max((panel.top for panel in shared), default=1.0)
    bottom = min((panel.bottom for panel in shared), default=0.0)
    return [
        panel if panel.apart else dataclasses.replace(panel, top=top, bottom=bottom)
        for panel in row
    ]


def _lettered(rows: Sequence[Sequence[Panel]]) -> list[list[Panel]]:
    letters = iter(
        [*string.ascii_lowercase]
        + [a + b for a in string.ascii_lowercase for b in string.ascii_lowercase]
    )
    return [
        [dataclasses.replace(panel, letter=next(letters, "")) for panel in _shared_range(row)]
        for row in rows
    ]


def _no_such_layer(wanted: int | str, summaries: Sequence[RunSummary]) -> str:
    layers = next(summary.run.layers for summary in summaries if summary.run.layers)
    return (
        f"--layers: no run has a layer '{printable(wanted)}'; the first run has 0 to "
        f"{len(layers) - 1}, {printable(layers[0].name)} to {printable(layers[-1].name)}"
    )
