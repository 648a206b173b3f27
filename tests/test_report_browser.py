"""The page in a real headless Chromium: panels drawn, hover right, controls work, nothing leaks."""

import io
import re
import shutil

import pandas as pd
import pytest
from PIL import Image

from pgt_diag.config import RunConfig
from pgt_diag.text import printable
from reports.demo import DemoRun, demo_runs
from reports.page import build_page
from reports.panels import fig3, thin
from reports.summary import summarise
from tests.hostile import HOSTILE

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]

# Each tries to run `pwn()`, to load something, or to break the text around it.


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page with everything that it complained of or asked for."""

    def __init__(self, browser, text, folder, **options):
        path = folder / "report.html"
        path.write_text(text, encoding="utf-8")
        self.complaints, self.requests = [], []
        # Reduced motion: no smooth scrolling between finding a place and pointing at it.
        viewport = {"width": 1280, "height": 900}
        options = {"viewport": viewport, "reduced_motion": "reduce"} | options
        self.page = browser.new_page(**options)
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", lambda d: (self.complaints.append(d.message), d.dismiss()))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(path.as_uri())

    def outside(self):
        return [url for url in self.requests[1:] if not url.startswith(("data:", "blob:"))]

    def wait_for_panels(self, count):
        self.page.locator(".plot[data-drawn]").nth(count - 1).wait_for(state="attached")


@pytest.fixture(scope="module")
def runs():
    return demo_runs(iteration_count=2000, record_every=10)


@pytest.fixture(scope="module")
def opened(browser, runs, tmp_path_factory):
    opened = Opened(browser, build_page(runs), tmp_path_factory.mktemp("page"))
    opened.wait_for_panels(6)
    yield opened
    opened.page.close()


@pytest.fixture
def page(opened):
    yield opened.page
    assert opened.complaints == []
    assert opened.outside() == []


# Read from a copy: reading a page's own canvas makes Chromium complain in its console.
COPY = """const copied = (canvas) => {
    const copy = Object.assign(document.createElement("canvas"),
        { width: canvas.width, height: canvas.height });
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height).data;
};"""
PIXELS = """canvas => {
    COPY
    const data = copied(canvas);
    const seen = new Map();
    for (let i = 0; i < data.length; i += 4) {
        const key = data[i] << 16 | data[i + 1] << 8 | data[i + 2];
        seen.set(key, (seen.get(key) ?? 0) + 1);
    }
    return { colours: seen.size, most: Math.max(...seen.values()), all: data.length / 4 };
}""".replace("COPY", COPY)
CORNER = "canvas => { COPY return [...copied(canvas).slice(0, 3)]; }".replace("COPY", COPY)


def pixels(page, panel):
    return page.locator(".plot canvas.lines").nth(panel).evaluate(PIXELS)


@pytest.mark.parametrize("panel", range(6))
def test_panels_are_drawn_in_many_colours(page, panel):
    seen = pixels(page, panel)
    assert seen["colours"] > 200
    assert seen["most"] < 0.95 * seen["all"]


def test_a_known_line_is_where_its_norm_is(page, runs):
    canvas = page.locator(".plot canvas.lines").first
    panel = fig3(summarise(runs), [11])[0][0]
    top = panel.top * 1.04
    values = panel.norms.to_numpy()
    highest = values.max(axis=1)
    # At the middle row, the highest line is the first ink from above.
    row = len(values) // 2
    share = panel.norms.index[row] / runs[0].iteration_count
    first_ink = canvas.evaluate(
        """(canvas, share) => {
            COPY
            const x = Math.round(share * canvas.width), data = copied(canvas);
            for (let y = 0; y < canvas.height; y++) {
                if (data[4 * (y * canvas.width + x) + 1] < 200) return y / canvas.height;
            }
        }""".replace("COPY", COPY),
        share,
    )
    assert first_ink == pytest.approx(1 - highest[row] / top, abs=0.02)


def test_the_hover_names_filter_iteration_norm_and_state(page, runs):
    panel = fig3(summarise(runs), [11])[0][0]
    norms = thin(panel.norms, 10**9)
    line = int(norms.iloc[100].idxmax())
    at, norm = int(norms.index[100]), float(norms.iloc[100, line])
    page.locator("#fig3 h2").scroll_into_view_if_needed()
    box = page.locator(".plot canvas.lines").first.bounding_box()
    x = box["x"] + box["width"] * at / runs[0].iteration_count
    y = box["y"] + box["height"] * (1 - norm / (panel.top * 1.04))
    page.mouse.move(x, y)
    said = page.inner_text("#tip")
    assert said.splitlines()[0] == f"filter {line}"
    found = re.search(r"iteration ([\d,]+) · norm ([\d.]+)", said)
    assert int(found[1].replace(",", "")) == at
    assert float(found[2]) == pytest.approx(norm, rel=0.01)
    assert "state: alive" in said and "never died" in said


def test_the_rug_names_a_death(page, runs):
    summary = summarise(runs)[0]
    deaths = fig3([summary], [19])[0][0].deaths
    death = deaths.iloc[len(deaths) // 2]
    page.locator(".panel").nth(2).scroll_into_view_if_needed()
    box = page.locator(".plot canvas.lines").nth(2).bounding_box()
    x = box["x"] + box["width"] * death["iteration"] / runs[0].iteration_count
    page.mouse.move(x, box["y"] + box["height"] - 3)
    said = page.inner_text("#tip")
    instants = deaths[(deaths["iteration"] - death["iteration"]).abs() < 5]["iteration"]
    assert any(f"died at iteration {at:,} (silent)" in said for at in instants)


def test_a_dead_filter_says_so_at_the_keyboard(page):
    page.locator(".panel").nth(2).focus()
    page.keyboard.press("Escape")
    # Down through all lines to the one with the smallest norm.
    page.evaluate(
        """() => {
            const panel = document.querySelectorAll(".panel")[2];
            for (let i = 0; i < 600; i++) {
                panel.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
            }
        }"""
    )
    said = page.inner_text("#tip")
    assert re.search("state: .*silent", said) and re.search("state: .*zero gradient", said)
    assert "not recovered" in said
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_silence_too_short_for_a_death_is_called_so(browser, tmp_path):
    run = DemoRun("x", RunConfig(epochs=3, warmup_epochs=0), 0.0, 1000, 10, shape=(("a", 2),))
    brief = [(kind, "a", 0, 0, 496, 504) for kind in ("silent", "zero_gradient")]
    events = pd.DataFrame(brief, columns=run.events.columns)
    run.__dict__["events"] = events.astype({"end_iteration": "Int64"})
    opened = Opened(browser, build_page([run], other_layers=False), tmp_path)
    opened.wait_for_panels(1)
    page = opened.page
    page.locator("#fig3 h2").scroll_into_view_if_needed()
    panel = page.locator(".panel").first
    panel.focus()
    said = set()
    for line in ("ArrowDown", "ArrowUp"):
        page.keyboard.press(line)
        for _ in range(100):
            page.keyboard.press("ArrowLeft")
            said.add(page.inner_text("#tip").replace("\n", " | "))
        for _ in range(100):
            page.keyboard.press("ArrowRight")
    (silent,) = [each for each in said if "state: silent, zero gradient" in each]
    assert silent.startswith("filter 0 | iteration 500 ·")
    assert silent.endswith("state: silent, zero gradient | not a death: shorter than 10 iterations")
    assert any(each.startswith("filter 0 ") and each.endswith("never died") for each in said)
    page.close()


def test_zoom_redraws_the_lines(page):
    page.mouse.move(5, 5)
    before = page.locator(".plot canvas.lines").first.evaluate("c => c.toDataURL()")
    page.locator("#fig3 h2").scroll_into_view_if_needed()
    box = page.locator(".plot canvas.lines").first.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 140, steps=4)
    page.mouse.up()
    page.wait_for_timeout(300)
    zoomed = page.locator(".plot canvas.lines").first.evaluate("c => c.toDataURL()")
    assert zoomed != before
    # Not a double click: on a busy machine its two clicks come too far apart.
    page.locator(".plot [data-title='Reset axes']").first.click()
    page.wait_for_timeout(500)
    page.mouse.move(5, 5)
    assert page.locator(".plot canvas.lines").first.evaluate("c => c.toDataURL()") == before


@pytest.mark.parametrize("view", ["heat", "bands"])
def test_other_views(page, view):
    lines = page.locator(".plot canvas.lines").first.evaluate("c => c.toDataURL()")
    page.check(f"input[value={view}]")
    page.wait_for_timeout(400)
    assert page.locator(".plot canvas.lines").first.evaluate("c => c.toDataURL()") != lines
    page.check("input[value=lines]")
    page.wait_for_timeout(400)
    assert page.locator(".plot canvas.lines").first.evaluate("c => c.toDataURL()") == lines


def test_other_layers_are_drawn_when_opened(page):
    drawn = page.locator(".folds .plot[data-drawn]")
    assert drawn.count() == 0
    page.locator(".folds > summary").click()
    page.locator(".fold summary").nth(3).click()
    drawn.nth(1).wait_for(state="attached")
    page.locator(".folds > summary").click()


def test_the_slider_moves_through_the_snapshots(page):
    slider = page.locator("#fig4-controls input[type=range]")
    slider.scroll_into_view_if_needed()
    window = page.locator(".maps-window").first
    seen = [window.screenshot()]
    said = [page.inner_text("#fig4-controls output")]
    slider.fill("0")
    seen.append(window.screenshot())
    said.append(page.inner_text("#fig4-controls output"))
    page.check("input[name=image][value='1']")
    seen.append(window.screenshot())
    assert said == ["iteration 1,999", "iteration 0"]
    assert len(set(seen)) == 3
    assert "0 of 64 channels dead" in page.inner_text(".maps-count >> nth=0")


def test_deaths_can_be_filtered_sorted_and_downloaded(page, runs):
    total = sum(len(summary.deaths) for summary in summarise(runs))
    page.fill("#deaths-search", "layer4.1.conv2 pgt")
    shown = page.inner_text("#deaths-count")
    few = int(shown.split(" of ")[0].replace(",", ""))
    assert 0 < few < total and shown.endswith(f"{total:,} deaths")
    page.click("#deaths-table th:nth-child(4) button")
    filters = page.locator("#deaths-table tbody td:nth-child(4)").all_inner_texts()
    assert filters == sorted(filters, key=int)
    with page.expect_download() as download:
        page.click("#deaths-csv")
    lines = download.value.path().read_text().splitlines()
    assert lines[0].startswith("run,layer,index,filter,iteration")
    assert len(lines) == few + 1
    page.fill("#deaths-search", "")


def axis_types(page, section):
    return page.eval_on_selector_all(
        f"#{section} .chart[data-by-epoch]",
        "charts => charts.map((each) => each._fullLayout.xaxis.type + each._fullLayout.yaxis.type)",
    )


BUTTONS_ABOVE = """charts => charts.every((chart) => {
  const edges = (name) => chart.querySelector(name).getBoundingClientRect();
  const plot = edges(".cartesianlayer .gridlayer");
  return edges(".modebar").bottom <= plot.top + 6 && plot.bottom < edges(".legend").top;
})"""
"""Whether neither plotly's buttons nor the legend cover any line."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figure_2_is_drawn_on_log_axes_of_its_own(browser, tmp_path, scheme):
    runs = [
        DemoRun(
            f"{method}-{model}",
            RunConfig(method=method, model=model, norm="batch", epochs=9, warmup_epochs=1),
            0.05, 200, 10,
        )
        for model in ("resnet18", "timm/seresnet18")
        for method in ("baseline", "pgt")
    ]  # fmt: skip
    opened = Opened(browser, build_page(runs), tmp_path, color_scheme=scheme)
    page = opened.page
    page.locator("#fig2 .chart[data-drawn]").nth(1).wait_for(state="attached")
    page.locator("#curves .chart[data-drawn]").nth(1).wait_for(state="attached")
    captions = page.locator("#fig2 figcaption").all_text_contents()
    assert captions == [
        f"{name}, cosine, digits, batch 256" for name in ("resnet18", "seresnet18")
    ]  # fmt: skip
    assert page.locator("#fig2 .chart").first.locator(".scatterlayer .trace").count() == 4
    assert page.eval_on_selector_all("#fig2 .chart, #curves .chart[data-drawn]", BUTTONS_ABOVE)
    assert axis_types(page, "fig2") == ["loglog"] * 2
    assert set(axis_types(page, "curves")) == {"linearlinear"}
    page.locator("#fig2 input[value=linear]").check()
    page.locator("#curves input[value=log]").check()
    assert axis_types(page, "fig2") == ["linearlinear"] * 2
    assert set(axis_types(page, "curves")) == {"loglog"}
    assert page.locator("#table1 tbody tr:not(.missing):not(.setting)").count() == 4
    assert opened.complaints == [] and opened.outside() == []
    page.close()


def test_charts_are_drawn_without_an_upload_button(page):
    page.locator("#curves").scroll_into_view_if_needed()
    chart = page.locator("#curves .chart[data-drawn]")
    chart.nth(3).wait_for(state="attached")
    assert page.locator("#curves .chart .scatterlayer path.js-line").count() >= 8
    titles = page.locator(".modebar-btn").evaluate_all("b => b.map(x => x.dataset.title)")
    assert titles
    assert not [title for title in titles if re.search("share|cloud|upload", title or "", re.I)]


def test_dark_and_narrow(browser, runs, tmp_path):
    opened = Opened(
        browser,
        build_page(runs, other_layers=False),
        tmp_path,
        color_scheme="dark",
        viewport={"width": 390, "height": 800},
    )
    opened.wait_for_panels(1)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    corner = page.locator(".plot canvas.lines").first.evaluate(CORNER)
    assert max(corner) < 60
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(800)
    corner = page.locator(".plot canvas.lines").first.evaluate(CORNER)
    assert min(corner) > 240
    assert opened.complaints == []
    page.close()


def test_readable_without_javascript(browser, runs, tmp_path):
    opened = Opened(browser, build_page(runs), tmp_path, java_script_enabled=False)
    page = opened.page
    text = page.inner_text("main")
    summary = summarise(runs)[0]
    assert f"{summary.dead:,} of 4,800 filters" in text
    assert "68.856" in text and "not run" in text
    assert summary.deaths.iloc[0]["layer"] in page.inner_text("#deaths-table")
    assert page.locator(".maps-window img").first.bounding_box()["width"] > 1000
    assert not page.locator("#fig4-controls").is_visible()
    stills = page.locator(".still img")
    assert stills.count() == 6
    for still in stills.all():
        box, panel = still.bounding_box(), still.locator("xpath=../..").bounding_box()
        assert box["width"] > 400 and 200 < box["height"] < panel["height"]
        ink = Image.open(io.BytesIO(still.screenshot())).convert("RGB").getcolors(10**6)
        assert len(ink) > 50
    page.close()


def on_paper(page):
    """Say which folds show their content in print, by the text of their summaries."""
    page.emulate_media(media="print")
    shown = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("details")].map((fold) => [
            fold.querySelector("summary").textContent.split(" ").slice(0, 2).join(" "),
            fold.lastElementChild.checkVisibility({ contentVisibilityAuto: true })
                && fold.lastElementChild.getBoundingClientRect().height > 0,
        ]))"""
    )
    page.emulate_media(media="screen")
    return shown


def test_folds_are_open_on_paper_but_for_layers_never_drawn(browser, runs, tmp_path):
    opened = Opened(browser, build_page(runs), tmp_path)
    page = opened.page
    opened.wait_for_panels(6)
    before = on_paper(page)
    assert before["Whole configuration"] and before["Environment and"] and before["All other"]
    assert not any(shown for fold, shown in before.items() if fold.startswith("layer "))
    page.locator(".folds > summary").click()
    page.locator(".fold summary").nth(3).click()
    opened.wait_for_panels(8)
    page.locator(".fold summary").nth(3).click()
    after = on_paper(page)
    assert [fold for fold in after if after[fold] != before[fold]] == ["layer 3"]
    page.emulate_media(media="print")
    assert page.locator(".paper-only").is_visible()
    canvas = page.locator(".fold canvas.lines").first
    assert canvas.is_visible() and canvas.evaluate(PIXELS)["colours"] > 50
    page.emulate_media(media="screen")
    assert not page.locator(".paper-only").is_visible()
    page.close()


def test_tables_are_open_on_paper_without_javascript(browser, runs, tmp_path):
    opened = Opened(browser, build_page(runs), tmp_path, java_script_enabled=False)
    opened.page.emulate_media(media="print")
    cell = opened.page.locator("details .config td").first
    assert cell.is_visible() and cell.bounding_box()["height"] > 0
    assert opened.page.locator(".maps-window img").first.bounding_box()["x"] < 0
    opened.page.close()


def test_lines_come_before_plotly_and_what_is_on_the_screen_first(browser, runs, tmp_path):
    """What makes the first picture soon: nothing else is worked on before it."""
    path = tmp_path / "report.html"
    path.write_text(build_page(runs), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(
        """window.order = [];
        new MutationObserver((changes) => {
            for (const { target, attributeName } of changes) {
                window.order.push(`${attributeName} ${target.dataset.island}`);
            }
        }).observe(document, { subtree: true, attributes: true,
            attributeFilter: ["data-painted", "data-drawn"] });
        addEventListener("DOMContentLoaded", () => setTimeout(() => {
            window.plotlyEarly = Boolean(window.Plotly);
        }));"""
    )
    page.goto(f"{path.as_uri()}#fig3")
    page.locator(".plot[data-drawn]").nth(5).wait_for(state="attached")
    order = page.evaluate("window.order")
    plots = page.locator("#fig3 > .panels .plot").all()
    names = [plot.get_attribute("data-island") for plot in plots]
    assert order[:4] == [f"data-painted {name}" for name in names[:4]]
    assert page.evaluate("window.plotlyEarly") is False
    page.close()


def test_the_hover_works_before_plotly_has_come(browser, runs, tmp_path):
    text = re.sub('id="plotly">[^<]*<', 'id="plotly"><', build_page(runs, other_layers=False))
    opened = Opened(browser, text, tmp_path)
    page = opened.page
    page.locator("#fig3 h2").scroll_into_view_if_needed()
    page.locator(".plot[data-painted]").nth(1).wait_for(state="attached")
    box = page.locator(".plot canvas.lines").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#tip").wait_for(state="visible")
    assert page.inner_text("#tip").startswith("filter ")
    page.close()


def hostile_run(place, string):
    config = RunConfig.from_mapping(
        {
            "method": ("baseline", "pgt", "gc", "agc")[place % 4],
            "seed": place,
            "data": string,
            "epochs": 3,
            "warmup_epochs": 0,
        }
    )
    # A folder's name can hold any bytes; a layer's name is text, since Parquet holds it.
    layer = string.encode("utf-8", "replace").decode()
    return DemoRun(
        string,
        None if place % 2 else config,
        mortality=0.9,
        iteration_count=60,
        record_every=6,
        shape=((layer + "a", 4), (layer + "b", 4)),
        status="interrupted",
        labels=(string, "x"),
        extra={
            "message": string,
            "model": string,
            "command": ["pgt-diag", string],
            "environment": {string: string},
            "gap_source": string,
            "data": {"classes": [string]},
        },
    )


def test_hostile_strings_run_nothing_and_appear_as_text(browser, tmp_path):
    assert len(HOSTILE) >= 50
    for group in range(3):
        strings = HOSTILE[group::3]
        runs = [hostile_run(place, string) for place, string in enumerate(strings)]
        opened = Opened(browser, build_page(runs, title=strings[0]), tmp_path)
        page = opened.page
        opened.wait_for_panels(2)
        page.locator("#curves").scroll_into_view_if_needed()
        page.locator("#curves .chart[data-drawn]").nth(0).wait_for(state="attached")
        page.fill("#deaths-search", "silent")
        text = page.evaluate("document.body.textContent")
        for string in strings:
            assert printable(string) in text, string
        # Whatever a payload would have made, had it been taken for markup.
        made = "img[src=x], iframe, object, embed, video, base, form, link, main script, main style"
        assert page.locator(made).count() == 0
        assert page.evaluate("typeof pwn") == "undefined"
        assert opened.complaints == []
        assert opened.outside() == []
        page.close()
