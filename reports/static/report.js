// Charts, the slider of Fig. 4, the table of deaths, and what happens when light or print changes.

const charts = [];

async function drawChart(place) {
  const Plotly = await loadPlotly();
  const { data, layout } = island(place.dataset.chart);
  charts.push({ place, layout, Plotly });
  await Plotly.newPlot(place, data, themed(layout), CONFIG);
  place.dataset.drawn = "yes";
}

function startCharts() {
  for (const place of document.querySelectorAll("[data-chart]")) whenNear(place, drawChart);
  for (const input of document.querySelectorAll("input[data-axes]")) {
    const section = input.closest("section");
    input.addEventListener("change", () => {
      const type = input.value;
      const axes = { "xaxis.type": type, "yaxis.type": type, "xaxis.autorange": true, "yaxis.autorange": true };
      for (const { place, Plotly } of charts) {
        if (place.matches("[data-by-epoch]") && section.contains(place)) Plotly.relayout(place, axes);
      }
    });
  }
}

/** Fig. 4: one slider and one choice of image move the sprites of all runs. */
function startMaps() {
  const section = document.getElementById("fig4-controls");
  if (!section) return;
  const slider = section.querySelector("input[type=range]");
  const output = section.querySelector("output");
  const instants = JSON.parse(slider.dataset.iterations);
  const figures = [...document.querySelectorAll(".maps")];
  const update = () => {
    const at = instants[slider.value];
    const image = Number(section.querySelector("input[name=image]:checked")?.value ?? 0);
    output.textContent = `iteration ${count(at)}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const figure of figures) {
      const { iterations, silent, dead, channels, images } = JSON.parse(figure.dataset.maps);
      const snapshot = Math.max(0, iterations.findLastIndex((iteration) => iteration <= at));
      const shown = Math.min(image, images - 1);
      figure.style.setProperty("--snapshot", snapshot);
      figure.style.setProperty("--image", shown);
      figure.querySelector(".maps-count").textContent =
        `${dead[snapshot]} of ${channels} channels dead, ${silent[snapshot][shown]} zero on this image only` +
        (iterations[snapshot] === at ? "" : ` (at ${count(iterations[snapshot])})`);
      figure.querySelectorAll(".inputs img").forEach((img, i) => img.classList.toggle("chosen", i === shown));
    }
  };
  section.addEventListener("input", update);
  update();
}

/** The table of deaths: filter by text, sort by column, 200 rows at a time, CSV of what is shown. */
function startDeaths() {
  const place = document.getElementById("deaths-table");
  if (!place) return;
  // The first rows are in the page already: nothing is parsed until somebody asks for more.
  let columns, rows, shown;
  const load = () => {
    if (!rows) ({ columns, rows } = island("deaths-data"));
  };
  const search = document.getElementById("deaths-search");
  const said = document.getElementById("deaths-count");
  const more = document.getElementById("deaths-more");
  const body = place.tBodies[0];
  let sort = Number(place.dataset.sorted), descending = false, limit = 50;
  const text = (value) => (value === null ? "–" : typeof value === "number" ? count(value) : value);
  const compare = (a, b) => {
    const [left, right] = [a[sort], b[sort]];
    if (left === null || right === null) return (left === null) - (right === null);
    const order = typeof left === "number" ? left - right : String(left).localeCompare(right);
    return descending ? -order : order;
  };
  const update = () => {
    load();
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (row) => words.every((word) => row.some((cell) => String(cell ?? "").toLowerCase().includes(word)));
    shown = rows.filter(matches).sort(compare);
    body.replaceChildren(...shown.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      for (const value of row) {
        const cell = line.insertCell();
        cell.textContent = text(value);
        if (typeof value === "number") cell.className = "n";
      }
      return line;
    }));
    said.textContent = `${count(shown.length)} of ${count(rows.length)} deaths`;
    more.hidden = shown.length <= limit;
    [...place.tHead.rows[0].cells].forEach((cell, i) => {
      if (i === sort) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
  };
  place.tHead.addEventListener("click", (event) => {
    const column = [...place.tHead.rows[0].cells].indexOf(event.target.closest("th"));
    if (column < 0) return;
    descending = column === sort && !descending;
    sort = column;
    update();
  });
  search.addEventListener("input", update);
  more.addEventListener("click", () => { limit = limit === 50 ? 500 : limit + 2000; update(); });
  document.getElementById("deaths-csv").addEventListener("click", () => {
    if (!shown) update();
    download("deaths.csv", [columns, ...shown].map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n");
  });
}

/** A cell that spreadsheets take as text: names may begin like a formula. */
function csvCell(value) {
  let cell = String(value ?? "");
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(cell)) cell = `'${cell}`;
  return /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
}

function download(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function startZeroOut() {
  for (const map of document.querySelectorAll(".zero-map")) {
    let data;
    map.addEventListener("mousemove", (event) => {
      data ??= island(map.dataset.map);
      const { edges, dead, unknown, layers, filters } = data;
      const box = map.getBoundingClientRect();
      const row = Math.floor(((event.clientY - box.top) / box.height) * layers.length);
      const bin = Math.floor(((event.clientX - box.left) / box.width) * edges.length);
      if (!dead[row] || dead[row][bin] === undefined) return;
      const maybe = unknown?.[row][bin];
      tip.textContent = `${layers[row]} · iteration ${count(edges[bin])}: ${dead[row][bin]} of ${filters[row]} dead`
        + (maybe ? `, ${maybe} unknown` : "");
      tip.style.borderLeftColor = css("--bad");
      tip.hidden = false;
      tip.style.left = `${Math.min(event.clientX + 16, root.clientWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${event.clientY + 18}px`;
    });
    map.addEventListener("mouseleave", () => { tip.hidden = true; });
  }
}

function startCopy() {
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        // A page from a file may not write to the clipboard: select the text instead.
        getSelection().selectAllChildren(code);
        button.textContent = "selected";
      }
    });
  }
}

/** Once the first picture stands, draw the rest in idle moments: nobody scrolls into a gap. */
async function settle() {
  await parsed;
  // The browser scrolls to the page's #fragment in the first frame, and tells what is near after.
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
  await calm();
  await new Promise((done) => setTimeout(done, 250)); // axes first
  root.classList.add("settled");
  for (const place of document.querySelectorAll("[data-island], [data-chart]")) {
    if (!place.checkVisibility()) continue; // in a closed fold
    await idle();
    await whenNear.all((element) => element === place);
  }
}

function retheme() {
  for (const panel of panels) if (panel.Plotly) panel.retheme();
  for (const { place, layout, Plotly } of charts) Plotly.relayout(place, colours(layout));
}

startPanels();
startCharts();
startMaps();
startDeaths();
startZeroOut();
startCopy();
settle();
darkness.addEventListener("change", retheme);
window.addEventListener("beforeprint", () => {
  root.classList.add("printing");
  // Folded panels stay folded on paper; all others must be there.
  whenNear.all((element) => element.checkVisibility());
  retheme();
});
window.addEventListener("afterprint", () => {
  root.classList.remove("printing");
  retheme();
});
