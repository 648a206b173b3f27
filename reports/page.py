"""The report: one HTML file that opens offline, made from runs by way of data tables."""

import base64
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from pgt_diag import __version__
from pgt_diag.text import printable
from reports import records, sections
from reports.demo import DemoRun
from reports.panels import DEFAULT_LAYERS
from reports.source import Run
from reports.summary import Epoch, summarise
from reports.text import ascii_script, ascii_style, json_island, plural
from reports.verdict import verdict

GENERATOR = f"pgt-diag {__version__}"

SCRIPTS = ("lines.js", "theme.js", "panels.js", "report.js")

CONTENTS = (
    ("verdict", "Verdict"),
    ("fig3", "Figure 3"),
    ("fig4", "Figure 4"),
    ("zero-out", "Zero-out map"),
    ("deaths", "Deaths"),
    ("fig2", "Figure 2"),
    ("tables", ""),
    ("curves", "Learning curves"),
    ("clipping", "Clipping"),
    ("runs", "Runs"),
)


def build_page(
    runs: Sequence[Run],
    *,
    layers: Sequence[int | str] | None = None,
    title: str | None = None,
    other_layers: bool = True,
    epoch: Epoch = Epoch.BEST,
) -> str:
    """Return the report on these runs as one complete HTML document.

    layers: the convolutions of Fig. 3, by the paper's index or by name, by default 11 and 19;
    `other_layers` adds all others behind a fold, which about doubles the size of the file. The
    document makes no request, carries its own policy against any, and escapes every string that
    came with the runs.
    Raises ConfigurationError when no run has one of the layers.
    """
    summaries = summarise(runs, epoch)
    islands: dict[str, object] = {}
    page = sections.figure3(summaries, layers or DEFAULT_LAYERS, islands, other_layers=other_layers)
    page |= {
        "generator": GENERATOR,
        "title": printable(title or _title([each.label for each in summaries]), 160),
        "subtitle": _subtitle(runs),
        "demo": any(isinstance(run, DemoRun) for run in runs),
        "runs": summaries,
        "verdict": verdict(runs, epoch),
        "fig4": sections.figure4(summaries),
        "zero_out": sections.zero_out(summaries, islands),
        "deaths": records.deaths(summaries, islands),
        "fig2": sections.figure2(summaries, islands),
        "tables": records.paper_tables(runs, epoch),
        "charts": sections.curves(summaries, islands),
        "clipping": sections.clipping(summaries, islands),
        "run_cards": records.run_cards(summaries),
        "config_tables": records.config_tables(summaries),
    }
    page["contents"] = _contents(page)
    first = {"panel-axes"} | {panel["id"] for row in page["fig3"] for panel in row}
    embedded = [(key, Markup(json_island(value))) for key, value in islands.items()]
    # What Fig. 3 needs comes before the script, so that its lines need not wait for the rest.
    page["islands"] = [each for each in embedded if each[0] in first]
    page["late_islands"] = [each for each in embedded if each[0] not in first]
    text = _environment().get_template("report.html.jinja").render(page | _assets())
    # One sign beyond Latin-1 makes a browser keep megabytes of data as two bytes a character.
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _contents(page: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the sections that this page has: anchors and names."""
    contents: list[tuple[str, str]] = []
    for anchor, name in CONTENTS:
        if anchor == "tables":
            contents += [(table["anchor"], table["name"]) for table in page["tables"]]
        elif page.get(anchor, True):  # the charts of what these runs do not have are None
            contents.append((anchor, name))
    return contents


def _title(labels: Sequence[str]) -> str:
    if not labels:
        return "No runs"
    if len(labels) <= 3:
        return " against ".join(labels) if len(labels) == 2 else ", ".join(labels)
    return plural(len(labels), "run")


def _subtitle(runs: Sequence[Run]) -> str:
    settings = dict.fromkeys(
        f"{printable(run.info.get('model') or 'a network')} on {run.config.dataset}"
        if run.config
        else printable(run.info.get("model") or "a network")
        for run in runs
    )
    shown = list(settings)[:3] + (["…"] if len(settings) > 3 else [])
    longest = max((run.iteration_count for run in runs), default=0)
    return f"{plural(len(runs), 'run')}: {', '.join(shown)}; {plural(longest, 'iteration')}"


def _static(name: str) -> str:
    return (files("reports") / "static" / name).read_text(encoding="utf-8")


@cache
def _assets() -> dict[str, str]:
    """Return style, scripts and plotly (deflated, for it is most of a small page) as text."""
    deflate = zlib.compressobj(level=9, wbits=-15)
    bundle = _static("plotly-basic.min.js").encode()
    plotly = base64.b64encode(deflate.compress(bundle) + deflate.flush()).decode("ascii")
    return {
        "css": Markup(ascii_style(_static("report.css"))),
        "javascript": Markup(ascii_script("\n".join(_static(name) for name in SCRIPTS))),
        "plotly": Markup(plotly),
    }


@cache
def _environment() -> Environment:
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(
            lambda name: (files("reports") / "templates" / name).read_text(encoding="utf-8")
        ),
    )
