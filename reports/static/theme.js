// Light and dark: plotly figures and canvases take the page's own colours.

const root = document.documentElement;
const darkness = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => darkness.matches && !root.classList.contains("printing");
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
// Not Intl's: it takes as long to set up as a panel takes to draw.
const count = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ",");
const island = (id) => JSON.parse(document.getElementById(id).textContent);

const CONFIG = {
  showSendToCloud: false, // plotly 7 would show a button that uploads the data
  displaylogo: false,
  responsive: true,
  showTips: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
};

/** Colours for a plotly layout, as the flat keys that relayout takes. */
function colours(layout) {
  const set = {
    "font.family": css("--sans"),
    "font.size": 12,
    "font.color": css("--muted"),
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    "hoverlabel.bgcolor": css("--paper"),
    "hoverlabel.bordercolor": css("--rule"),
    "hoverlabel.font.color": css("--ink"),
    "modebar.bgcolor": "rgba(0,0,0,0)",
    "modebar.color": css("--faint"),
    "modebar.activecolor": css("--ink"),
    "legend.bgcolor": "rgba(0,0,0,0)",
  };
  for (const axis of ["xaxis", "yaxis"]) {
    if (!layout[axis]) continue;
    set[`${axis}.linecolor`] = css("--faint");
    set[`${axis}.tickcolor`] = css("--faint");
    set[`${axis}.gridcolor`] = css("--rule");
    set[`${axis}.showline`] = true;
    set[`${axis}.ticks`] = "outside";
    set[`${axis}.ticklen`] = 4;
  }
  return set;
}

function themed(layout) {
  const copy = structuredClone(layout);
  for (const [path, value] of Object.entries(colours(layout))) {
    const keys = path.split(".");
    let place = copy;
    for (const key of keys.slice(0, -1)) place = place[key] ??= {};
    place[keys.at(-1)] = value;
  }
  return copy;
}

const idle = () => new Promise((done) => {
  (window.requestIdleCallback ?? ((call) => setTimeout(call, 50)))(done, { timeout: 1000 });
});

let lastTurn = Promise.resolve();
/** Do one piece of work after the other, so that the first is on the screen soonest. */
function inTurn(work) {
  const turn = lastTurn.then(work);
  lastTurn = turn.catch(() => {}).then(() => new Promise((done) => setTimeout(done)));
  return turn;
}

/** Wait until all such work is done and the browser has had time to show it. */
async function calm() {
  let turn;
  do {
    turn = lastTurn;
    await turn;
    await idle();
  } while (turn !== lastTurn);
}

/** The lines of Fig. 3 stand before this script in the page; all other data come after it. */
const parsed = new Promise((done) => {
  if (document.readyState !== "loading") done();
  else document.addEventListener("DOMContentLoaded", done);
});

let plotly;
/** Load plotly once, when the first chart comes into view: it travels deflated. */
function loadPlotly() {
  plotly ??= parsed.then(calm).then(() => inflate(document.getElementById("plotly").textContent)).then((code) => {
    const script = document.createElement("script");
    script.textContent = new TextDecoder().decode(code);
    document.head.append(script);
    return window.Plotly;
  });
  return plotly;
}

/** Call draw(element) once, when the element comes near the screen. */
const whenNear = (() => {
  const waiting = new Map();
  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) start(target);
  }, { rootMargin: "50px" });
  function start(target) {
    const draw = waiting.get(target);
    if (!draw) return null;
    waiting.delete(target);
    observer.unobserve(target);
    return draw(target);
  }
  const watch = (element, draw) => {
    waiting.set(element, draw);
    observer.observe(element);
  };
  watch.all = (inside) => Promise.all([...waiting.keys()].filter((e) => inside(e)).map(start));
  return watch;
})();
