"""What the template prints of the figures, section by section, as plain values.

Payloads for the browser (lines, charts, rows) go into `islands`, by element id; the page embeds
each as escaped JSON.
"""

import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from pgt_diag.filters import EVENT_KINDS
from pgt_diag.text import printable
from reports import figures, panels, sprites, stills, zeroout
from reports.summary import RunSummary
from reports.text import dead_share, layer_name, number, plural, share

Islands = MutableMapping[str, object]

MAX_REVIVAL_MARKS = 300


def figure3(
    summaries: Sequence[RunSummary],
    layers: Sequence[int | str],
    islands: Islands,
    *,
    other_layers: bool,
) -> dict[str, Any]:
    """Return the panels of Fig. 3 and, if wanted, those of all other layers."""
    shown = panels.fig3(summaries, layers)
    main_bytes, fold_bytes = panels.line_bytes(len(summaries))
    main = panels.pack_panels(shown, panels.MAIN_ROWS, main_bytes)
    rest = panels.other_layers(summaries, shown) if other_layers else []
    folds = panels.pack_panels(rest, panels.FOLD_ROWS, fold_bytes)
    last = max((summary.run.iteration_count for summary in summaries), default=1)
    islands["panel-axes"] = _figure(figures.panel_axes(last))
    pictures = iter(stills.stills([panel for row in shown for panel in row], last))
    return {
        "fig3": [
            [_panel(each, summaries, islands) | {"still": next(pictures)} for each in row]
            for row in main
        ],
        "folds": [[_panel(each, summaries, islands) for each in row] for row in folds],
        "fig3_thinned": _thinned(main),
        "folds_thinned": _thinned(folds),
    }


def _thinned(rows: Sequence[Sequence[panels.PackedPanel]]) -> str:
    """Say how many of the stored rows a group of panels shows; nothing where it shows all."""
    fewer = [each for row in rows for each in row if each.lines.rows < each.panel.stored]
    if not fewer:
        return ""
    each = max(fewer, key=lambda each: each.panel.stored)
    return (
        f"To bound the size of the page, these lines show {each.lines.rows:,} of up to "
        f"{each.panel.stored:,} stored rows, evenly spread; where a line fell below half of its "
        "value in between, its minimum is shown."
    )


def _panel(
    packed: panels.PackedPanel, summaries: Sequence[RunSummary], islands: Islands
) -> dict[str, object]:
    panel, key = packed.panel, f"panel-{len(islands)}"
    label, filters = summaries[panel.run].label, packed.lines.lines
    said = _who_died(panel, filters) if filters else ""
    said += ", diverged: own y axis" if filters and panel.apart else ""
    subject = printable(panel.subject, 80)
    if not panel.message:
        islands[key] = _panel_island(packed)
    letter = f"({panel.letter}) " if panel.letter else ""
    return {
        "id": key,
        "letter": panel.letter,
        "label": label,
        "subject": subject,
        "said": said,
        "message": panel.message,
        "still": None,
        "aria": f"{letter}{label}, {subject}: {said or panel.message}",
    }


def _who_died(panel: panels.Panel, filters: int) -> str:
    died = panel.deaths["filter"].nunique()
    dead = int(panel.deaths["revival_iteration"].isna().sum())
    end = "dead at the end" if panel.unit == "filter" else "zero at the end"
    text = f"{dead:,} of {plural(filters, panel.unit)} {end}"
    text += f", {died:,} died at least once" if died != dead else ""
    return text + (f", {len(panel.unknown):,} may have died" if panel.unknown else "")


def _panel_island(packed: panels.PackedPanel) -> dict[str, object]:
    panel = packed.panel
    return {
        "unit": panel.unit,
        "top": panel.top,
        "range": figures.panel_range(panel),
        "iterations": panel.norms.index.tolist(),
        "lines": packed.lines.__dict__,
        "deaths": _columns(panel.deaths, ("filter", "at", "back", "cause")),
        "events": _columns(
            panel.events.assign(kind=panel.events["kind"].map(EVENT_KINDS.index)),
            ("kind", "filter", "from", "to"),
        ),
        "cut": panel.cut,
        "window": panel.window,
        "unknown": panel.unknown,
    }


def _columns(table: pd.DataFrame, names: Sequence[str]) -> dict[str, list[object]]:
    """Return a table by column: a tenth of the bytes of one object per row."""
    plain = table.astype(object).where(table.notna(), None)
    return {name: plain[column].tolist() for name, column in zip(names, table, strict=True)}


def _figure(figure: go.Figure) -> object:
    """Return a figure as plain JSON values, its arrays as plotly's base64."""
    return json.loads(figure.to_json())


def figure4(summaries: Sequence[RunSummary]) -> dict[str, Any] | None:
    """Return the sprites, and the instants and images that the controls choose from."""
    drawn = [
        (summary, each)
        for summary, each in zip(summaries, sprites.sprites(summaries), strict=True)
        if each is not None
    ]
    if not drawn:
        return None
    layers = dict.fromkeys(
        f"layer {sprites.layer_position(summary.run, each.layer)} ({layer_name(each.layer)})"
        for summary, each in drawn
    )
    images = max((each.labels for _, each in drawn), key=len)
    return {
        "layer": ", ".join(layers),
        "instants": sorted({at for _, each in drawn for at in each.iterations}),
        "labels": [f"image {i + 1}: {printable(label)}" for i, label in enumerate(images)],
        "sprites": [_sprite(summary, each) for summary, each in drawn],
    }


def _sprite(summary: RunSummary, each: sprites.Sprite) -> dict[str, object]:
    states, images = each.states, len(each.inputs)
    counts = states.assign(silent=states["zero"] & ~states["dead"])
    silent = counts.groupby(["iteration", "image"])["silent"].sum().astype(int)
    dead = counts[counts["image"] == 0].groupby("iteration")["dead"].sum().astype(int)
    islands = {
        "iterations": each.iterations,
        "silent": [[int(silent[at, i]) for i in range(images)] for at in each.iterations],
        "dead": [int(dead[at]) for at in each.iterations],
        "channels": each.channels,
        "images": images,
    }
    last = each.iterations[-1]
    return {
        "label": summary.label,
        "uri": each.uri,
        "width": each.width,
        "height": each.height,
        "snapshots": len(each.iterations),
        "images": images,
        "channels": each.channels,
        "inputs": list(zip(each.inputs, (printable(label) for label in each.labels), strict=False)),
        "counts": json.dumps(islands),
        "said": f"{dead[last]} of {each.channels} channels dead, {silent[last, 0]} zero on the "
        f"first image only, iteration {last:,}",
    }


def zero_out(summaries: Sequence[RunSummary], islands: Islands) -> list[dict[str, object]]:
    """Return a map per run with its table of layers, and the curve of all dead filters."""
    maps = [zeroout.zero_out_map(summary) for summary in summaries]
    islands["chart-dead"] = _figure(figures.dead_curves(summaries, [each.dead for each in maps]))
    shown: list[dict[str, object]] = []
    for place, (summary, each) in enumerate(zip(summaries, maps, strict=True)):
        if each.dead.empty:
            continue
        key = f"map-{place}"
        layers = summary.by_layer
        islands[key] = {
            "edges": each.dead.columns.tolist(),
            "dead": each.dead.to_numpy().tolist(),
            "unknown": each.unknown.to_numpy().tolist() if len(summary.unknown) else None,
            "layers": [layer_name(name) for name in layers.index],
            "filters": layers["filters"].tolist(),
        }
        shown.append(
            {
                "label": summary.label,
                "island": key,
                "uri": zeroout.map_png(each.share, each.unknown),
                "unknown": bool((each.unknown > 0).any(axis=None)),
                "end": f"{each.iteration_count:,}",
                "rows": [_layer_row(str(name), row) for name, row in layers.iterrows()],
                "revivals": _revival_marks(each, list(layers.index)),
            }
        )
    return shown


def _layer_row(name: str, row: "pd.Series[Any]") -> dict[str, object]:
    return {
        "index": row["index"],
        "layer": printable(name),
        "dead": row["dead"],
        "unknown": row["unknown"],
        "filters": row["filters"],
        "share": dead_share(row["dead"], row["unknown"], row["filters"]),
        "revivals": row["revivals"] or "–",
        "first": "–" if pd.isna(row["first_death"]) else f"{row['first_death']:,}",
    }


def _revival_marks(each: zeroout.ZeroOutMap, layers: list[str]) -> list[dict[str, str]]:
    height = 100 / max(1, len(layers))
    return [
        {
            "x": f"{100 * int(str(row.iteration)) / each.iteration_count:.2f}",
            "y": f"{height * (layers.index(str(row.layer)) + 0.5):.2f}",
        }
        for row in each.revivals.head(MAX_REVIVAL_MARKS).itertuples()
    ]


def figure2(summaries: Sequence[RunSummary], islands: Islands) -> list[dict[str, object]] | None:
    """Return Fig. 2's panels, a chart and its sentences each; None where no runs make one."""
    panels = []
    for title, runs in figures.figure2_panels(summaries):
        means = figures.figure2_curves(runs)
        chart = _chart(title, figures.figure2(means), islands)
        panels.append(chart | {"sentences": _overtaking(means)})
    return panels or None


def _overtaking(means: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say when each curve has the best test accuracy of the first, the baseline: Fig. 2(c)."""
    (first, start), *others = means.items()
    goal, its_epoch = float(start["test_accuracy"].max()), start["test_accuracy"].idxmax()
    told = f"the {number(goal)} % that {first} has at its best, epoch {its_epoch}"
    sentences = []
    for label, table in others:
        reached = table.index[table["test_accuracy"] >= goal]
        if len(reached):
            sentences.append(f"{label}: at epoch {reached[0]} it has {told}.")
        else:
            best = number(float(table["test_accuracy"].max()))
            sentences.append(f"{label}: never has {told}; {best} % at its own best.")
    return sentences


def curves(summaries: Sequence[RunSummary], islands: Islands) -> list[dict[str, object]]:
    """Return the ordinary charts: by epoch first, then by iteration."""
    made = [
        (
            "Accuracy by epoch: test solid, train dotted",
            figures.learning_curves(summaries, "accuracy"),
            True,
        ),
        (
            "Loss by epoch: test solid, train dotted",
            figures.learning_curves(summaries, "loss"),
            True,
        ),
        ("Learning rate", figures.iteration_curves(summaries, "lr", "learning rate"), False),
        (
            "Gradient norm, as the optimizer received it",
            figures.iteration_curves(summaries, "grad_norm", "global gradient norm", log=True),
            False,
        ),
    ]
    return [
        _chart(title, figure, islands) | {"by_epoch": by_epoch}
        for title, figure, by_epoch in made
        if figure.data
    ]


def _chart(title: str, figure: go.Figure, islands: Islands) -> dict[str, object]:
    key = f"chart-{len(islands)}"
    islands[key] = _figure(figure)
    return {"id": key, "title": title}


def clipping(summaries: Sequence[RunSummary], islands: Islands) -> dict[str, object] | None:
    """Return what GC and AGC clipped; None where no run clips."""
    by_time, by_layer = figures.clipping(summaries), figures.clipping_by_layer(summaries)
    if by_time is None and by_layer is None:
        return None
    charts = []
    if by_time is not None:
        charts.append(_chart("GC: share of steps clipped", by_time, islands))
    if by_layer is not None:
        charts.append(_chart("AGC: share of filter steps clipped, by layer", by_layer, islands))
    sentences = [text for summary in summaries for text in _clipping_sentences(summary)]
    return {"sentences": sentences, "charts": charts}


def _clipping_sentences(summary: RunSummary) -> list[str]:
    sentences = []
    coefficient = summary.run.iterations.get("clip_coefficient")
    if coefficient is not None and coefficient.notna().any():
        clipped = coefficient[coefficient < 1]
        limit = f" at norm {summary.run.config.clip_norm:g}" if summary.run.config else ""
        often = share(len(clipped), coefficient.count())
        text = f"{summary.label}: GC{limit} clipped {often} of the steps"
        if len(clipped):
            text += f", to {share(float(clipped.median()), 1)} of the gradient at the median"
        sentences.append(text + ".")
    activity = figures.agc_activity(summary)
    if not activity.empty:
        layer, clipped, factor = max(activity.itertuples(name=None), key=lambda row: row[1])
        sentences.append(
            f"{summary.label}: AGC clipped most in {layer_name(layer)}: {number(clipped, 1)} % of "
            f"its filters' steps, mean factor {number(factor, 3)}."
        )
    return sentences
