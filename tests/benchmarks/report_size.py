"""Measure a report of two made-up runs of 1,500 stored rows: bytes, build time, renderer CPU time.

    python tests/benchmarks/report_size.py [--rows 1500]

"First picture" is the renderer process's CPU time until the lines of the four panels in the first
900 pixels of Fig. 3 are drawn; "finished" until all six panels have their axes and rugs too.
Budgets: 4 MB for Fig. 3, Fig. 4 and Table 2, 8 MB with all layers, 1.0 s to the first picture.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from reports.demo import demo_runs
from reports.page import build_page

REPEATS = 7

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def renderer_seconds(browser: Browser) -> float:
    """Return the CPU time of all renderer processes."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    return sum(each["cpuTime"] for each in processes if each["type"] == "renderer")


def measure(page_path: Path, *, finished: bool) -> float:
    """Return the renderer's CPU seconds from navigation to the drawn panels."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto("about:blank")
        before = renderer_seconds(browser)
        page.goto(f"{page_path.as_uri()}#fig3")
        page.locator(".plot[data-painted]").nth(3).wait_for(state="attached")
        if finished:
            page.locator(".panel").nth(5).scroll_into_view_if_needed()
            page.locator(".plot[data-drawn]").nth(5).wait_for(state="attached")
        spent = renderer_seconds(browser) - before
        browser.close()
        return spent


def spread(seconds: list[float]) -> str:
    """Return the median and the range of sorted values."""
    return f"{seconds[len(seconds) // 2]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"


def main() -> None:
    """Build, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500)
    rows = parser.parse_args().rows
    runs = demo_runs(iteration_count=24 * rows, record_every=24)
    start = time.perf_counter()
    whole = build_page(runs)
    built = time.perf_counter() - start
    fig3 = build_page(runs, other_layers=False)
    print(f"built in {built:.2f} s")
    print(f"Fig. 3, Fig. 4, Table 2: {len(fig3.encode()) / 1e6:.2f} MB")
    print(f"with all layers:         {len(whole.encode()) / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("Fig. 3 page", fig3), ("all layers", whole)):
            path = Path(folder) / "report.html"
            path.write_text(text, encoding="utf-8")
            first = sorted(measure(path, finished=False) for _ in range(REPEATS))
            six = sorted(measure(path, finished=True) for _ in range(REPEATS))
            print(f"{name}, renderer CPU: first picture {spread(first)}, finished {spread(six)}")


if __name__ == "__main__":
    main()
