"""The ordinary charts, as plotly figures. Colours and fonts that depend on light or dark are left
to the page, which sets them when it draws.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pgt_diag.config import Method
from pgt_diag.text import printable
from reports.layouts import is_batch_normalised
from reports.panels import Panel
from reports.summary import RunSummary
from reports.text import method_label, number, plotly_text, plural

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")

BUCKETS = 500
"""Points per curve: more than a chart has pixels only makes the page heavier."""


def learning_curves(summaries: Sequence[RunSummary], column: str) -> go.Figure:
    """Return train (thin, dashed) and test (thick) curves by epoch; column: accuracy or loss."""
    figure = _figure("epoch", "accuracy (%)" if column == "accuracy" else "loss")
    for place, summary in enumerate(summaries):
        metrics = summary.run.metrics
        for part, width, dash in (("train", 1.2, "dot"), ("test", 2.2, "solid")):
            name = f"{part}_{column}"
            if name not in metrics or metrics[name].isna().all():
                continue
            few = len(metrics) <= 40
            figure.add_scatter(
                x=metrics["epoch"] + 1,
                y=metrics[name],
                name=f"{plotly_text(summary.label)}, {part}",
                mode="lines+markers" if few and part == "test" else "lines",
                line={"color": _colour(place), "width": width, "dash": dash},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 6},
            )
    return figure


def figure2_panels(summaries: Sequence[RunSummary]) -> list[tuple[str, list[RunSummary]]]:
    """Return the networks with batch normalisation that PGT and its baseline were trained on.

    Each is a panel of the paper's Fig. 2: a title, and the finished runs of both methods that
    share all but α, seed and the number of epochs, of which Fig. 2(c) compares two.
    """
    panels: dict[str, list[RunSummary]] = {}
    for summary in summaries:
        config = summary.run.config
        if config is None or not is_batch_normalised(config) or config.label_smoothing:
            continue
        if summary.run.status == "finished" and config.method in (Method.BASELINE, Method.PGT):
            name = config.model.rpartition("/")[2]
            title = f"{name}, {config.schedule}, {config.dataset}, batch {config.batch_size}"
            panels.setdefault(printable(title), []).append(summary)
    return [
        (title, runs) for title, runs in panels.items() if len({_method(each) for each in runs}) > 1
    ]


def figure2_curves(runs: Sequence[RunSummary]) -> dict[str, pd.DataFrame]:
    """Return mean accuracies over seeds by epoch (from 1), by method, α and length of a panel.

    Columns train_accuracy and test_accuracy, in percent.
    """
    lengths = {each.run.config.epochs for each in runs if each.run.config}
    together: dict[str, list[pd.DataFrame]] = {}
    for each in sorted(runs, key=lambda run: _method(run) != Method.BASELINE):
        config, metrics = each.run.config, each.run.metrics
        if config is None or "test_accuracy" not in metrics:
            continue
        label = method_label(each.run)
        label += f", {plural(config.epochs, 'epoch')}" if len(lengths) > 1 else ""
        columns = metrics[["train_accuracy", "test_accuracy"]]
        together.setdefault(label, []).append(columns.set_axis(metrics["epoch"] + 1))
    return {label: pd.concat(each).groupby(level=0).mean() for label, each in together.items()}


def figure2(curves: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Return a panel of Fig. 2: test solid, train dotted, on logarithmic axes as the paper's."""
    figure = _figure("epoch", "accuracy (%)")
    figure.update_layout(xaxis_type="log", yaxis_type="log")
    for place, (label, table) in enumerate(curves.items()):
        for part, width, dash in (("train", 1.2, "dot"), ("test", 2.2, "solid")):
            figure.add_scatter(
                x=table.index,
                y=table[f"{part}_accuracy"],
                name=f"{plotly_text(label)}, {part}",
                mode="lines+markers" if len(table) <= 40 and part == "test" else "lines",
                line={"color": _colour(place), "width": width, "dash": dash},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 6},
            )
    return figure


def _method(summary: RunSummary) -> Method | None:
    return summary.run.config.method if summary.run.config else None


def iteration_curves(
    summaries: Sequence[RunSummary], column: str, title: str, log: bool = False
) -> go.Figure:
    """Return the median over short stretches of an every-iteration column, a curve per run."""
    figure = _figure("iteration", title)
    if log:
        figure.update_yaxes(type="log", dtick="D2")
    for place, summary in enumerate(summaries):
        iterations = summary.run.iterations
        if column not in iterations or iterations[column].isna().all():
            continue
        curve = bucketed(iterations[column])
        if log:
            curve = curve.where(curve > 0)
        figure.add_scatter(
            x=curve.index,
            y=curve,
            name=plotly_text(summary.label),
            mode="lines",
            line=_line(place),
        )
    return figure


def dead_curves(summaries: Sequence[RunSummary], dead: Sequence[pd.DataFrame]) -> go.Figure:
    """Return the number of dead filters of the whole network over time, a step curve per run.

    dead: per run, dead filters by layer (rows) and time bin (columns), as in the zero-out map.
    """
    figure = _figure("iteration", "dead filters")
    figure.update_yaxes(rangemode="tozero")
    for place, (summary, table) in enumerate(zip(summaries, dead, strict=True)):
        if table.empty:
            continue
        figure.add_scatter(
            x=table.columns,
            y=table.sum(axis=0),
            name=plotly_text(summary.label),
            mode="lines",
            line=_line(place) | {"shape": "hv"},
        )
    return figure


def clipped_share(summary: RunSummary) -> pd.Series:
    """Return, for stretches of the run, the share of steps whose global norm GC clipped."""
    coefficient = summary.run.iterations.get("clip_coefficient")
    if coefficient is None or coefficient.isna().all():
        return pd.Series(dtype=float)
    clipped = (coefficient < 1).astype(float).where(coefficient.notna())
    return bucketed(clipped, buckets=100, mean=True) * 100


def clipping(summaries: Sequence[RunSummary]) -> go.Figure | None:
    """Return how often GC clipped, in percent of the steps; None where it never could."""
    figure = _figure("iteration", "steps clipped by GC (%)")
    figure.update_yaxes(range=[0, 103])
    for place, summary in enumerate(summaries):
        series = clipped_share(summary)
        if len(series):
            figure.add_scatter(
                x=series.index,
                y=series,
                name=plotly_text(summary.label),
                mode="lines",
                line=_line(place),
            )
    return figure if figure.data else None


def agc_activity(summary: RunSummary) -> pd.DataFrame:
    """Return, per layer, how often AGC clipped a filter and how hard, over the whole run.

    Index layer; columns clipped (percent of filters and iterations), factor (mean over all, 1
    where nothing was clipped). Empty for a run without AGC.
    """
    factors = summary.run.mean_clip_factors
    if factors.empty or factors.isna().all(axis=None):
        return pd.DataFrame(columns=["clipped", "factor"])
    filters = pd.Series({layer.name: layer.filters for layer in summary.run.layers})
    clipped = 100 * summary.run.state_counts("clipped").mean() / filters
    return pd.DataFrame({"clipped": clipped, "factor": factors.mean()}).reindex(filters.index)


def clipping_by_layer(summaries: Sequence[RunSummary]) -> go.Figure | None:
    """Return a bar per layer and run: how often AGC clipped its filters; None without AGC."""
    figure = _figure("", "filter steps clipped by AGC (%)")
    for place, summary in enumerate(summaries):
        table = agc_activity(summary)
        if table.empty:
            continue
        factors = [f"mean factor {number(value, 3)}" for value in table["factor"]]
        figure.add_bar(
            x=[plotly_text(name) for name in table.index],
            y=table["clipped"],
            name=plotly_text(summary.label),
            hovertext=factors,
            marker={"color": _colour(place), "pattern": {"shape": ("", "/", "x")[place % 3]}},
        )
    figure.update_xaxes(tickangle=-45)
    return figure if figure.data else None


def panel_axes(last_iteration: int) -> go.Figure:
    """Return what all panels of Fig. 3 share: axes, zoom and the rug's two kinds of marks.

    The page draws the lines on a canvas beneath, since plotly's own would take ten times as long,
    and sets each panel's y range and the instants of its rug. Gridlines stay off: they would be
    drawn over the canvas.
    """
    # Fixed margins: the page places the canvas before plotly has measured any label.
    bare = {"showgrid": False, "zeroline": False, "automargin": False}
    hidden = {"overlaying": "y", "range": [0, 1], "fixedrange": True, "visible": False}
    rug = [
        {
            "yaxis": "y2",
            "name": name,
            "mode": "markers",
            "marker": {"symbol": symbol, "size": size, "line": {"width": 1}},
            "cliponaxis": False,
        }
        for name, symbol, size in (
            ("died", "line-ns-open", 11),
            ("revived", "triangle-up-open", 8),
        )
    ]
    # plotly makes no axis without a trace on it; the first stands for the lines on the canvas.
    return go.Figure(
        data=[{"x": [None], "y": [None], "name": "lines", "mode": "lines"}, *rug],
        layout={
            "template": "none",
            "margin": {"l": 54, "r": 10, "t": 6, "b": 40},
            "hovermode": False,
            "showlegend": False,
            "dragmode": "zoom",
            "xaxis": _axis("iteration") | bare | {"range": [0, max(1, last_iteration)]},
            "yaxis": _axis("L2 norm") | bare,
            "yaxis2": bare | hidden,
        },
    )


def panel_range(panel: Panel) -> list[float]:
    """Return a panel's y range: from 0 where some line comes near it, else close to the lines.

    Without a collapse the paper's range would squeeze all lines into one band.
    """
    margin = 0.04 * (panel.top - panel.bottom)
    if panel.bottom < 0.5 * panel.top or not margin:
        return [0, panel.top * 1.04]
    return [panel.bottom - 3 * margin, panel.top + margin]


def bucketed(series: pd.Series, buckets: int = BUCKETS, mean: bool = False) -> pd.Series:
    """Return medians (or means) of at most `buckets` equal stretches, at their middle index."""
    if len(series) <= buckets:
        return series
    group = np.arange(len(series)) * buckets // len(series)
    grouped = series.groupby(group)
    values = grouped.mean() if mean else grouped.median()
    middle = pd.Series(series.index).groupby(group).median().round().astype(int)
    return values.set_axis(pd.Index(middle, name=series.index.name))


def _figure(x: str, y: str) -> go.Figure:
    return go.Figure(
        layout={
            # Not plotly's default, which would add 6 kB of colours to every figure.
            "template": "none",
            "margin": {"l": 56, "r": 14, "t": 28, "b": 44},
            "xaxis": _axis(x),
            "yaxis": _axis(y),
            "legend": {
                "orientation": "h",
                # Below, for plotly's own buttons are above; of a sweep's many runs it scrolls.
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
                "x": 0,
                "maxheight": 0.25,
            },
            "hovermode": "x unified",
        }
    )


def _axis(title: str) -> dict[str, object]:
    return {
        "title": {"text": title, "standoff": 8},
        "zeroline": False,
        "automargin": True,
        "tickangle": 0,
    }


def _colour(place: int) -> str:
    return OKABE_ITO[place % len(OKABE_ITO)]


def _line(place: int) -> dict[str, object]:
    return {"color": _colour(place), "dash": DASHES[place % len(DASHES)], "width": 1.8}
