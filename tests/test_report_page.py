"""The page as text: complete, within its budgets, and made for every kind of run."""

import base64
import html
import io
import json
import re
import time
from importlib.resources import files

import numpy as np
import pandas as pd
import plotly.offline
import pytest
from PIL import Image

import pgt_diag
from pgt_diag.config import RunConfig
from pgt_diag.errors import ConfigurationError
from reports import panels, stills
from reports.demo import DemoRun, demo_runs
from reports.digest import digest
from reports.exports import export_table
from reports.page import build_page
from reports.summary import summarise

TINY = (("conv1", 4), ("layer1.0.conv1", 6), ("layer1.0.conv2", 6))


def config(method="baseline", **values):
    plain = {"method": method, "epochs": 3, "warmup_epochs": 0}
    return RunConfig.from_mapping(plain | values)


def tiny(name="tiny", method="baseline", config_seed=0, **options):
    options = {"iteration_count": 60, "record_every": 6, "shape": TINY} | options
    return DemoRun(name, config(method, seed=config_seed), **options)


def broken_values():
    run = tiny("broken", mortality=0.5)
    iterations = run.iterations.copy()
    iterations.loc[:, ["lr", "grad_norm", "loss"]] = np.nan
    run.__dict__["iterations"] = iterations
    metrics = run.metrics.copy()
    metrics[["test_accuracy", "train_loss"]] = np.nan
    run.__dict__["metrics"] = metrics
    return run


def infinite_values():
    run = tiny("infinite", mortality=0.5)
    iterations = run.iterations.copy()
    iterations.loc[::3, ["grad_norm", "loss"]] = np.inf
    iterations.loc[1::3, "loss"] = np.nan
    run.__dict__["iterations"] = iterations
    metrics = run.metrics.copy()
    metrics["train_loss"], metrics["test_loss"] = np.inf, -np.inf
    run.__dict__["metrics"] = metrics
    return run


CASES = {
    "no runs": [],
    "one": [tiny()],
    "nothing recorded": [tiny(iteration_count=0, status="running")],
    "one iteration": [tiny(iteration_count=1)],
    "running": [tiny(status="running")],
    "diverged": [tiny(status="diverged", extra={"message": "loss is NaN at iteration 59"})],
    "without configuration": [DemoRun("own", None, iteration_count=30, shape=TINY)],
    "without metrics": [tiny()],
    "no layers": [DemoRun("linear", None, iteration_count=30, shape=())],
    "different networks": [tiny(), tiny("b", shape=(("features.0", 3),)), demo_runs(50, 5)[0]],
    "zero deaths": [tiny(mortality=0.0)],
    "all dead": [tiny(mortality=9.0)],
    "NaN": [broken_values()],
    "infinite": [infinite_values(), tiny()],
    "clipping": [tiny(method="gc"), tiny("a", "agc"), tiny("c", "agc+pgt")],
    "twenty": [tiny(f"run {i}", ("baseline", "pgt")[i % 2], seed=i) for i in range(20)],
}
CASES["without metrics"][0].__dict__["metrics"] = pd.DataFrame()


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_makes_a_page(case):
    page = build_page(CASES[case])
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    for island in re.findall(
        r'<script type="application/json" id="[^"]+">(.*?)</script>', page, re.S
    ):
        json.loads(island, parse_constant=pytest.fail)


def test_losses_that_are_no_numbers_are_null_in_json():
    for runs in ([broken_values()], [infinite_values(), tiny()]):
        text = json.dumps(digest(runs), allow_nan=False)
        assert [run["label"] for run in json.loads(text)["runs"]]
        json.loads(export_table(runs, "json"), parse_constant=pytest.fail)


def test_forty_five_runs_are_all_on_one_page():
    runs = [tiny(f"run {n}", ("baseline", "pgt")[n % 2], seed=n) for n in range(45)]
    page = html.unescape(build_page(runs))
    for summary in summarise(runs):
        assert f"folder {summary.run.name};" in page
    assert len({summary.label for summary in summarise(runs)}) == 45


def test_the_page_forbids_requests_and_names_no_other_file():
    page = build_page([tiny()])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.split("; ") == [
        "default-src 'none'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
    ]
    assert not re.findall(r'<link|<script[^>]* src|<img[^>]* src="(?!data:)|@import|url\(', page)


def test_the_title_is_escaped():
    page = build_page([tiny()], title="<b>&\"'")
    assert "<title>&lt;b&gt;&amp;&#34;&#39;</title>" in page


def test_made_up_runs_are_called_so():
    assert "This report is made up" in build_page([tiny()])


def test_layers_can_be_chosen_by_name():
    page = html.unescape(build_page([tiny()], layers=["layer1.0.conv1"]))
    assert "layer 1 filters · layer1.0.conv1" in page


def test_a_hostile_layer_can_be_chosen_by_name_and_is_escaped():
    name = "</script><b onclick=x>\u202e"
    run = tiny(shape=((name, 3), ("other", 3)))
    page = build_page([run], layers=[name])
    assert "layer 0 filters · </script><b onclick=x>�" in html.unescape(page)
    assert "&lt;/script&gt;&lt;b onclick=x&gt;" in page
    assert "<b onclick" not in page and "\u202e" not in page
    with pytest.raises(ConfigurationError) as error:
        build_page([run], layers=["\x1b[31mno"])
    assert "'�[31mno'" in str(error.value) and "\u202e" not in str(error.value)


def test_the_page_says_what_made_it():
    assert f'<meta name="generator" content="pgt-diag {pgt_diag.__version__}">' in build_page([])


def test_unfinished_runs_say_so_first():
    page = build_page([tiny(status="interrupted")])
    assert "was interrupted" in page[page.index("<main>") : page.index('id="fig3"')]


def test_budgets():
    """Issue 3: 4 MB for Figs. 3 and 4 and Table 2, 8 MB with all layers; a smoke run in 5 s."""
    runs = demo_runs(iteration_count=36_000, record_every=24)
    assert len(runs[0].weight_norms("conv1")) == 1500
    assert len(build_page(runs, other_layers=False).encode()) <= 4e6
    page = build_page(runs)
    assert len(page.encode()) <= 8e6
    # What only browsers without JavaScript show.
    assert sum(map(len, re.findall("<noscript>.*?</noscript>", page, re.DOTALL))) <= 150_000
    start = time.process_time()
    build_page(demo_runs(iteration_count=200, record_every=1)[:1])
    assert time.process_time() - start <= 5


def test_twenty_runs_fit_into_the_same_page():
    methods = ("baseline", "pgt", "gc", "agc")
    runs = [
        DemoRun(f"{i}", config(methods[i % 4], seed=i // 4, epochs=100), 0.15, 4000, 10, seed=i)
        for i in range(20)
    ]
    page = build_page(runs)
    assert len(page) <= panels.PAGE_BYTES
    said = re.findall(r"these lines show (\d+) of up to (\d+) stored rows", page)
    assert [stored for _, stored in said] == ["400", "400"]
    shown = {int(rows) for rows in re.findall(r'"rows":(\d+),"top"', page)}
    assert shown == {int(rows) for rows, _ in said}


def test_all_stored_rows_need_no_remark():
    assert "To bound the size" not in build_page([tiny()])


def test_the_page_is_ascii_and_shows_every_sign_all_the_same():
    page = build_page([tiny()], title="α 漢 😀")
    assert page.isascii()
    assert "<title>α 漢 😀</title>" in html.unescape(page)
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert r'content: "\2713 "' in style


def test_browsers_without_javascript_get_still_pictures_of_figure_3():
    runs = [tiny("<b>", mortality=0.9), tiny("p", "pgt", mortality=0.0)]
    held = re.findall("<noscript>(<div.*?)</noscript>", build_page(runs), re.DOTALL)
    # Two layers and the pooled features of both runs; nothing for the layers behind the fold.
    assert len(held) == 6
    assert not any("<b>" in each for each in held)
    for each in held:
        data = re.search(r'src="data:image/png;base64,([^"]+)"', each)[1]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        lines = pixels[: -stills.RUG]
        # Lines run all the way, in several colours, and leave ground above.
        assert (lines > 0).any(axis=0).mean() > 0.9
        assert 3 <= len(np.unique(lines[lines > 0])) <= 7
        assert not lines[0].any()
    tops = [re.search("<span>([^<]+)</span>", each)[1] for each in held]
    assert tops[0] == tops[1] and tops[2] == tops[3]


def test_the_vendored_bundle_is_the_plotly_in_use():
    bundle = (files("reports") / "static" / "plotly-basic.min.js").read_text(encoding="utf-8")
    version = re.search(r"plotly\.js \(basic - minified\) v([\d.]+)", bundle)[1]
    assert version == plotly.offline.get_plotlyjs_version()
    licence = (files("reports") / "static" / "plotly-basic.LICENSE.txt").read_text()
    assert "MIT License" in licence and "Plotly" in licence


def test_scripts_cannot_end_their_own_element():
    for name in ("lines.js", "theme.js", "panels.js", "report.js", "report.css"):
        text = (files("reports") / "static" / name).read_text(encoding="utf-8")
        assert "</script" not in text and "</style" not in text and "<!--" not in text


def test_table2_exports():
    runs = [
        tiny(method + str(seed), method, seed=seed, mortality=mortality, config_seed=seed)
        for seed in range(3)
        for method, mortality in (("baseline", 3.0), ("pgt", 0.0))
    ]
    records = json.loads(export_table(runs, "json"))
    assert records[0]["method"] == "baseline" and records[0]["runs"] == 3
    assert records[-1]["note"] == "not run" and records[-1]["train_accuracy"] is None
    csv = export_table(runs, "csv").splitlines()
    assert csv[0].startswith("setting,batch_size,method,alpha,variant,runs") and len(csv) == 11
    latex = export_table(runs, "latex")
    assert latex.count(r"\\") >= 3 and r"\textcolor{blue}{\textbf{" in latex
    hostile = DemoRun("50%_&$#{}~^\\", None, iteration_count=12, shape=TINY)
    assert r"50\%\_\&\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in (
        export_table([hostile], "latex")
    )


def normalised(method, **values):
    return DemoRun(
        f"{method}-{values}", config(method, norm="batch", **values), 0.1, 60, 6, shape=TINY
    )


def test_networks_with_batch_norm_have_figure_2_and_tables_1_and_3():
    runs = [normalised("baseline"), normalised("pgt"), normalised("pgt", label_smoothing=0.1)]
    page = html.unescape(build_page(runs))
    anchors = re.findall('<section id="([^"]+)">', page)
    assert [each for each in anchors if each.startswith(("table", "fig2"))] == [
        "fig2", "table1", "table3"
    ]  # fmt: skip
    assert re.findall('<a href="#((?:table|fig2)[^"]*)">', page) == ["fig2", "table1", "table3"]
    assert "resnet18, cosine, digits, batch 256</figcaption>" in page
    section = page[page.index('id="table3"') : page.index('id="curves"')]
    assert '<th scope="col" class="n">smoothing</th>' in section and ">gap</th>" in section
    assert 'id="table2"' not in page and "Table 1 has one epoch of each run" in page
    plain = build_page([tiny()])
    assert 'id="table2"' in plain and 'id="table1"' not in plain and 'id="fig2"' not in plain


def test_tables_1_and_3_export():
    runs = [normalised("baseline"), normalised("pgt", label_smoothing=0.1, alpha=0.5)]
    # Where no run is without batch normalisation, Table 1 is meant.
    csv = export_table(runs, "csv").splitlines()
    assert csv[0].startswith("setting,model,schedule,label_smoothing,method,alpha,variant,runs")
    assert len(csv) == 1 + 2 + 13  # ResNet-18 in cosine, not smoothed, is a row of the paper
    assert len(json.loads(export_table(runs, "json", 3))) == 2 + 8
    latex = export_table(runs, "latex", 3)
    assert latex.startswith("% Table 3, made by pgt-diag") and r"Gap (\%)" in latex
    assert "cosine & 0.1 & PGT & 0.5 &" in latex
    columns = len(re.search(r"begin{tabular}{(\w+)}", latex)[1])
    assert all(line.count("&") == columns - 1 for line in latex.splitlines() if "&" in line)


def test_a_recorded_run_makes_a_page(tmp_path):
    """The seam to the engine: what a recorder wrote, read back, is what pages are made from."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        # Filter 2 is silent from the start, on whatever image, and the others never are.
        model[0].weight.abs_()
        model[0].bias.fill_(0.5)
        model[0].weight[2] = 0
        model[0].bias[2] = -1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pgt_diag.FilterRecorder(model, tmp_path / "mine", optimizer=optimizer):
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(torch.rand(2, 1, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
    page = build_page([pgt_diag.load_run(tmp_path / "mine")])
    text = re.sub(r"<[^>]+>", "", page[page.index("<main>") : page.index("</main>")])
    assert "1 of 4 filters (25.0 %) is dead after 30 iterations" in text
    assert "1 was silent from the first recorded batch; none died later." in text
    assert "1 of 4 filters dead at the end" in text
    # The layer's name is a number, which no sentence can bear alone.
    assert "Most are in module 0 (1 of 4)." in text
    assert "first death:" not in text.lower()
