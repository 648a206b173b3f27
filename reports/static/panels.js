// Fig. 3: a panel is a canvas with the lines, an empty plotly figure above it, and a hover.

const tip = document.getElementById("tip");
const KINDS = ["silent", "zero gradient", "collapsed", "zeroed"];
const panels = [];
let view = "lines";
const zero = document.getElementById("from-zero");
const fromZero = () => zero.checked;
let shared;
/** What all panels have alike, as a plotly figure. */
const axes = () => (shared ??= island("panel-axes"));

class Panel {
  constructor(place) {
    this.place = place;
    const data = island(place.dataset.island);
    const { filter, at, back, cause } = data.deaths;
    const deaths = filter.map((line, i) => ({ filter: line, at: at[i], back: back[i], cause: cause[i] }));
    this.data = { ...data, deaths };
    panels.push(this);
  }

  /** Draw the lines first, where plotly will place them; plotly takes as long as all the rest. */
  async draw() {
    await inTurn(() => this.drawLines());
    await calm();
    this.Plotly = await loadPlotly();
    const { data, layout } = axes();
    this.setHome();
    const placed = { ...layout, yaxis: { ...layout.yaxis, range: this.home.slice() } };
    await this.Plotly.newPlot(this.plot, this.rug(data), themed(placed), {
      ...CONFIG,
      // A picture of the axes alone would be no picture of the panel.
      modeBarButtonsToRemove: [...CONFIG.modeBarButtonsToRemove, "toImage"],
    });
    this.plot.on("plotly_afterplot", () => this.paint());
    this.plot.on("plotly_relayouting", (change) => this.paint(change));
    if (view === "heat") await this.show();
    this.paint();
    this.place.dataset.drawn = "yes";
  }

  async drawLines() {
    this.values = await unpackLines(this.data.lines);
    this.canvas = this.layer("lines");
    this.plot = document.createElement("div");
    this.plot.className = "axes";
    this.place.append(this.plot);
    this.setHome();
    this.paint();
    this.listen();
    this.place.dataset.painted = "yes";
  }

  setHome() {
    this.home = fromZero() ? [0, this.data.top * 1.04] : this.data.range.slice();
  }

  layer(name) {
    const canvas = document.createElement("canvas");
    canvas.className = name;
    canvas.setAttribute("aria-hidden", "true");
    this.place.append(canvas);
    return canvas;
  }

  rug(traces) {
    const inks = { died: css("--ink"), revived: css("--accent") };
    const { deaths } = this.data;
    const instants = {
      died: deaths.map((death) => death.at),
      revived: deaths.map((death) => death.back).filter((at) => at !== null),
    };
    return traces.map((trace) => {
      const x = instants[trace.name];
      if (!x) return trace;
      const marker = { ...trace.marker, color: inks[trace.name] };
      return { ...trace, x, y: x.map(() => 0.018), marker, opacity: 0.75 };
    });
  }

  /** The part of the plot in data and pixels. */
  frame() {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    if (!this.plot._fullLayout?.xaxis) {
      const { margin, xaxis } = axes().layout;
      return {
        left: margin.l, top: margin.t, ratio, x: xaxis.range, y: this.home,
        width: this.place.clientWidth - margin.l - margin.r,
        height: this.place.clientHeight - margin.t - margin.b,
      };
    }
    const { xaxis, yaxis } = this.plot._fullLayout;
    return {
      left: xaxis._offset, top: yaxis._offset, ratio,
      x: xaxis.range.map(Number), y: yaxis.range.map(Number),
      width: xaxis._length, height: yaxis._length,
    };
  }

  paint(change = {}) {
    const frame = this.frame();
    if (change["xaxis.range[0]"] !== undefined) {
      frame.x = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    }
    if (change["yaxis.range[0]"] !== undefined) {
      frame.y = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
    }
    const key = JSON.stringify([frame, view, isDark()]);
    if (key === this.painted) return; // plotly also reports what changes nothing here
    this.painted = key;
    this.fit(this.canvas, frame);
    if (this.mark) this.fit(this.mark, frame);
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d", { alpha: false });
    const series = this.series(frame, width);
    if (view === "bands") {
      context.fillStyle = css("--panel");
      context.fillRect(0, 0, width, height);
      drawBands(context, series, frame.y, css("--accent"));
    } else {
      const image = blank(width, height, css("--panel"));
      if (view === "heat") drawHeatMap(image, series, this.order(), frame.y, this.data.top);
      else drawLines(image, series, frame.y, isDark());
      context.putImageData(image, 0, 0);
    }
  }

  fit(canvas, { left, top, width, height, ratio }) {
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    Object.assign(canvas.style, {
      left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`,
    });
  }

  series({ x: [from, to] }, width) {
    const { iterations, lines } = this.data;
    const x = Float64Array.from(iterations, (at) => ((at - from) / (to - from)) * width);
    return { values: this.values, lines: lines.lines, rows: lines.rows, x };
  }

  /** Lines from the smallest final norm to the largest: the collapsed lie together at the bottom. */
  order() {
    const { lines: { lines, rows } } = this.data;
    this.sorted ??= Array.from({ length: lines }, (_, line) => line)
      .sort((a, b) => this.values[(a + 1) * rows - 1] - this.values[(b + 1) * rows - 1]);
    return this.sorted;
  }

  show() {
    const heat = view === "heat";
    this.painted = null;
    this.hide();
    this.setHome();
    return this.Plotly.relayout(this.plot, {
      "yaxis.range": heat ? [0, this.data.lines.lines] : this.home.slice(),
      "yaxis.title.text": heat ? `${this.data.unit}s, by final norm` : "L2 norm",
    });
  }

  retheme() {
    const inks = this.rug(axes().data).map((trace) => trace.marker?.color ?? null);
    this.painted = null;
    this.Plotly.update(this.plot, { "marker.color": inks }, colours(axes().layout));
  }

  listen() {
    const card = this.place.closest(".panel");
    this.place.addEventListener("mousemove", (event) => this.point(event));
    this.place.addEventListener("mouseleave", () => this.hide());
    card.addEventListener("blur", () => this.hide());
    card.addEventListener("keydown", (event) => this.key(event));
  }

  point(event) {
    const frame = this.frame(), box = this.place.getBoundingClientRect();
    const x = event.clientX - box.left - frame.left, y = event.clientY - box.top - frame.top;
    if (x < 0 || y < 0 || x > frame.width || y > frame.height + 12) return this.hide();
    const at = frame.x[0] + (x / frame.width) * (frame.x[1] - frame.x[0]);
    const value = frame.y[1] - (y / frame.height) * (frame.y[1] - frame.y[0]);
    const onRug = y > frame.height - 12 && this.nearestDeath(at, (8 / frame.width) * (frame.x[1] - frame.x[0]));
    const row = this.rowAt(at);
    const line = onRug ? onRug.filter
      : this.nearestLine(row, value, ((view === "heat" ? 2 : 28) / frame.height) * (frame.y[1] - frame.y[0]));
    if (line === null || line === undefined) return this.hide();
    return this.select(line, row, event.clientX, event.clientY);
  }

  key(event) {
    const { rows, lines } = this.data.lines;
    const step = Math.max(1, Math.round(rows / 100));
    let { line = this.order()[lines - 1], row = rows - 1 } = this.chosen ?? {};
    const place = this.order().indexOf(line);
    if (event.key === "ArrowLeft") row = Math.max(0, row - step);
    else if (event.key === "ArrowRight") row = Math.min(rows - 1, row + step);
    else if (event.key === "ArrowUp") line = this.order()[Math.min(lines - 1, place + 1)];
    else if (event.key === "ArrowDown") line = this.order()[Math.max(0, place - 1)];
    else if (event.key === "Escape") return this.hide();
    else return undefined;
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    return this.select(line, row, box.left + box.width / 2, box.top + 20);
  }

  rowAt(at) {
    const { iterations } = this.data;
    let low = 0, high = iterations.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (iterations[middle] <= at) low = middle;
      else high = middle;
    }
    return at - iterations[low] > iterations[high] - at ? high : low;
  }

  nearestLine(row, value, reach) {
    if (view === "heat") return this.order()[Math.floor(value)] ?? null;
    const { lines, rows } = this.data.lines;
    let best = null;
    for (let line = 0; line < lines; line++) {
      const distance = Math.abs(this.values[line * rows + row] - value);
      if (distance < reach) [reach, best] = [distance, line];
    }
    return best;
  }

  nearestDeath(at, reach) {
    let best = null;
    for (const death of this.data.deaths) {
      const distance = Math.abs(death.at - at);
      if (distance <= reach) [reach, best] = [distance, death];
    }
    return best;
  }

  select(line, row, x, y) {
    this.chosen = { line, row };
    const said = this.describe(line, row);
    const [red, green, blue] = lineColour(line, isDark());
    tip.replaceChildren(...said.map((text, i) => {
      const part = document.createElement(i ? "span" : "b");
      part.textContent = text;
      return part;
    }));
    tip.style.borderLeftColor = `rgb(${red} ${green} ${blue})`;
    tip.hidden = false;
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(x + 16, root.clientWidth - wide - 8))}px`;
    tip.style.top = `${y + 18 + high > window.innerHeight ? y - high - 12 : y + 18}px`;
    this.highlight(line, row);
  }

  /** What the hover says: filter, iteration, norm, state, death. */
  describe(line, row) {
    const { unit, iterations, deaths, events, cut, window: least, unknown, lines: { rows } } = this.data;
    const at = iterations[row], norm = this.values[line * rows + row];
    const holds = (_, i) => events.filter[i] === line && events.from[i] <= at
      && (events.to[i] === null || events.to[i] > at);
    const held = events.kind.filter(holds);
    const kinds = KINDS.filter((_, kind) => held.includes(kind));
    const mine = deaths.filter((d) => d.filter === line);
    const dead = mine.find((d) => d.at <= at && (d.back === null || d.back > at));
    if (!kinds.length && dead) kinds.push(dead.cause);
    // What would be a death, had it lasted.
    const brief = !dead && (kinds.includes("collapsed")
      || (kinds.includes("silent") && kinds.includes("zero gradient")));
    if (unit === "feature" && norm === 0) kinds.push("silent");
    const said = [
      `${unit} ${line}`,
      `iteration ${count(at)} · norm ${norm === 0 ? "exactly 0" : norm.toPrecision(4)}`,
      `state: ${kinds.join(", ") || (cut ? "alive, or silent too briefly for this page" : "alive")}`,
    ];
    if (mine.length > 4) said.push(`${mine.length} deaths; the last ones:`);
    for (const death of mine.slice(-4)) {
      if (unit === "feature") said.push(`zero from iteration ${count(death.at)} to the end`);
      else said.push(`died at iteration ${count(death.at)} (${death.cause}), ${
        death.back === null ? "not recovered" : `recovered at ${count(death.back)}`}`);
    }
    if (brief) said.push(`not a death: shorter than ${count(least)} iterations`);
    if (unknown.includes(line)) said.push("unknown whether it died: not all was seen");
    else if (said.length === 3) said.push(unit === "feature" ? "not zero at the end" : "never died");
    return said;
  }

  highlight(line, row) {
    const frame = this.frame();
    if (!this.mark) {
      this.mark = this.layer("mark");
      this.fit(this.mark, frame);
    }
    const context = this.mark.getContext("2d");
    const { width, height } = this.mark;
    context.clearRect(0, 0, width, height);
    const { x } = this.series(frame, width), { rows } = this.data.lines;
    const y = (value) => height - ((value - frame.y[0]) / (frame.y[1] - frame.y[0])) * height;
    context.lineJoin = "round";
    context.strokeStyle = css("--ink");
    context.lineWidth = 2.2 * frame.ratio;
    context.beginPath();
    if (view === "heat") {
      const place = y(this.order().indexOf(line) + 0.5);
      context.moveTo(0, place);
      context.lineTo(width, place);
    } else {
      for (let k = 0; k < rows; k++) context.lineTo(x[k], y(this.values[line * rows + k]));
    }
    context.stroke();
    context.fillStyle = css("--ink");
    context.beginPath();
    const dot = view === "heat" ? y(this.order().indexOf(line) + 0.5) : y(this.values[line * rows + row]);
    context.arc(x[row], dot, 4 * frame.ratio, 0, 7);
    context.fill();
  }

  hide() {
    this.chosen = null;
    tip.hidden = true;
    this.mark?.getContext("2d").clearRect(0, 0, this.mark.width, this.mark.height);
  }
}

function startPanels() {
  for (const place of document.querySelectorAll("[data-island]")) {
    whenNear(place, () => new Panel(place).draw());
  }
  zero.addEventListener("change", () => {
    for (const panel of panels) if (panel.Plotly) panel.show();
  });
  for (const input of document.querySelectorAll("input[name=view]")) {
    input.addEventListener("change", () => {
      view = input.value;
      for (const panel of panels) if (panel.Plotly) panel.show();
    });
  }
}
