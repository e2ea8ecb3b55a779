// Draw the figures of a page: ltecli/charts/page.py computes what is in them, this script how they look.
"use strict";

const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const NARROW = 640, LABEL_GAP = 15, NOTE_SPACE = 120;
const hiddenRuns = new Set();
const chosenView = {};

const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const number = value => value === null ? "-" : Number(value.toPrecision(4)).toLocaleString("en-US", {maximumSignificantDigits: 4});
function inUnit(value, kind) {
  if (value === null || !kind) return number(value);
  const units = kind === "bytes" ? [[1e3, 1, "B"], [1e6, 1e3, "kB"], [1e9, 1e6, "MB"], [1e12, 1e9, "GB"], [Infinity, 1e12, "TB"]]
    : [[1e-3, 1e-6, "us"], [1, 1e-3, "ms"], [120, 1, "s"], [7200, 60, "min"], [172800, 3600, "h"], [Infinity, 86400, "days"]];
  const [, size, unit] = units.find(([limit]) => value < limit);
  return `${Number((value / size).toPrecision(3)).toLocaleString("en-US")} ${unit}`;
}
const isNarrow = () => window.innerWidth < NARROW;

// A point's words: its value, and where it lies on every axis.
function words(figure, trace, view, index) {
  if (trace.text) return trace.text[index].replaceAll("\n", "<br>");
  const seen = new Set([view.y]);
  const lines = [`${view.y_title} <b>${number(trace.columns[view.y][index])}</b>`];
  for (const other of figure.views) {
    const column = trace.columns[other.x];
    if (seen.has(other.x) || !column) continue;
    seen.add(other.x);
    if (column[index] !== null) lines.push(`${other.x === "step" ? "step" : other.label} ${inUnit(column[index] * (other.x_scale || 1), other.x_kind)}`);
  }
  if (!seen.has("step") && trace.columns.step) lines.splice(1, 0, `step ${number(trace.columns.step[index])}`);
  return lines.join("<br>");
}

function drawn(figure, trace, view, index) {
  const x = trace.columns[view.x], y = trace.columns[view.y], ink = colour(trace.colour);
  const common = {
    name: trace.name, x: x, y: y, showlegend: false,
    visible: !(hiddenRuns.has(trace.run) || (trace.only !== undefined && trace.only !== index)),
    hovertext: y.map((_, at) => words(figure, trace, view, at)), hoverinfo: trace.kind === "bar" ? "text" : "text+name",
  };
  if (trace.kind === "bar") {
    return {...common, type: "bar", orientation: "h", width: 0.78, base: trace.columns.base,
            marker: {color: ink, line: {width: 0}}};
  }
  const line = {color: ink, width: trace.kind === "course" ? 1.3 : 2, shape: trace.kind === "front" ? "hv" : "linear"};
  const marks = {
    line: {mode: "lines+markers", line: line, marker: {color: ink, size: y.length > 80 ? 3 : 5}},
    course: {mode: "lines", line: line},
    front: {mode: "lines", line: {...line, width: 1.2, dash: "dot"}, hoverinfo: "skip"},
    dots: {mode: "markers", marker: {color: ink, size: 5.5, opacity: 0.5}},
    diamonds: {mode: "markers", marker: {color: ink, size: 9, symbol: "diamond", opacity: 0.9}},
    ring: {mode: "markers", marker: {color: ink, size: 13, symbol: "circle-open", line: {width: 2}}},
  };
  return {...common, type: "scatter", connectgaps: true, ...marks[trace.kind]};
}

const title = text => ({text: text, standoff: 10, font: {size: 12.5}});

function axis(text, isLog, ticks) {
  const marks = ticks ? {tickmode: "array", tickvals: ticks.map(tick => tick[0]), ticktext: ticks.map(tick => tick[1])}
    : {nticks: isNarrow() ? 5 : 9, tickformat: "~s"};
  return {
    title: title(text), type: isLog ? "log" : "linear", gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false,
    tickfont: {size: 11.5}, automargin: true, ...marks,
  };
}

function layout(figure, view) {
  const isBars = Boolean(figure.rows), narrow = isNarrow();
  const hasLabels = figure.traces.some(trace => trace.label);
  const shared = {
    autosize: true, height: figure.height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, color: colour("soft"), size: 12}, hovermode: "closest",
    hoverlabel: {bgcolor: colour("paper"), bordercolor: colour("line"), font: {color: colour("ink"), size: 12.5}, align: "left", namelength: 40},
    // A finger that scrolls the page must not zoom the figure.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    margin: {l: 8, r: hasLabels && !narrow ? labelSpace(figure) : 16, t: 14, b: 8},
    xaxis: axis(view.x_title, view.x_log, view.x_ticks), yaxis: axis(view.y_title, view.y_log, view.y_ticks), shapes: [], annotations: [], showlegend: false,
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("front"), activecolor: colour("ink")},
  };
  if (!view.x_log && view.x_kind) shared.xaxis.tickformat = "~g";
  if (!view.y_log) shared.yaxis.tickformat = "~g";
  if (isBars) bars(figure, view, shared);
  if (view.x_limit) limit(view, shared);
  return shared;
}

function labelSpace(figure) {
  const longest = Math.max(...figure.traces.map(trace => (trace.label || "").length));
  return Math.min(190, 18 + 7.2 * longest);
}

function bars(figure, view, shared) {
  const rows = figure.rows, notes = figure.notes || [];
  shared.barmode = notes.length ? "stack" : "overlay";
  Object.assign(shared.xaxis, {fixedrange: true, nticks: 5, tickformat: "~g", rangemode: "tozero"});
  if (notes.length) {
    // Words at the ends of bars stand in the margin, so that the axis ends where the bars do.
    shared.xaxis.range = [0, 1.01 * Math.max(...notes.map(note => note[0][view.x]))];
    shared.margin.r = 14 + 6.8 * Math.max(...notes.map(note => note[2].length));
  }
  Object.assign(shared.yaxis, {
    range: [rows.length - 0.4, figure.groups ? -1.3 : -0.7], showgrid: false, fixedrange: true, tickmode: "array",
    tickvals: rows.map((_, at) => at).filter(at => rows[at]), ticktext: rows.filter(Boolean), title: undefined, tickformat: undefined,
  });
  for (const [y, text] of figure.groups || []) {
    shared.annotations.push({x: 0, y: y, xref: "paper", xanchor: "left", text: `<b>${text}</b>`, showarrow: false, font: {color: colour("ink"), size: 12.5}});
  }
  for (const [x, y, text] of notes) {
    shared.annotations.push({x: x[view.x], y: y, xanchor: "left", xshift: 4, text: text, showarrow: false, font: {color: colour("ink"), size: 12}});
  }
}

function limit(view, shared) {
  const [x, text] = view.x_limit;
  shared.shapes.push({type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: {color: colour("alarm"), width: 1.2, dash: "dash"}});
  shared.annotations.push({x: view.x_log ? Math.log10(x) : x, y: 0, yref: "paper", xanchor: "right", yanchor: "bottom", xshift: -5, bgcolor: colour("paper"), text: text, showarrow: false, font: {color: colour("alarm"), size: 11.5}});
}

// Names beside the last points, pushed apart where they would cover each other.
function directLabels(plot, figure, view) {
  const full = plot._fullLayout, fixed = layout(figure, view).annotations;
  if (isNarrow() || figure.rows || !figure.traces.some(trace => trace.label)) return fixed;
  const x = full.xaxis, y = full.yaxis, height = y._length, placed = [];
  for (const trace of figure.traces) {
    if (!trace.label || hiddenRuns.has(trace.run) || (trace.only !== undefined && trace.only !== (chosenView[plot.id] || 0))) continue;
    const xs = trace.columns[view.x], ys = trace.columns[view.y];
    let last = -1;
    xs.forEach((value, at) => { if (value !== null && ys[at] !== null && x.d2p(value) <= x._length + 1) last = at; });
    if (last < 0) continue;
    const top = y.d2p(ys[last]), left = x.d2p(xs[last]);
    if (top >= -1 && top <= height + 1 && left >= -1) placed.push({trace: trace, top: top, left: left});
  }
  placed.sort((a, b) => a.top - b.top);
  const atEnd = figure.traces.some(trace => trace.kind !== "ring" && trace.label);
  if (atEnd) {
    for (let at = 1; at < placed.length; at++) placed[at].top = Math.max(placed[at].top, placed[at - 1].top + LABEL_GAP);
    for (let at = placed.length - 1, most = height; at >= 0; at--, most -= LABEL_GAP) placed[at].top = Math.min(placed[at].top, most);
  }
  return fixed.concat(placed.map(({trace, top, left}) => ({
    text: trace.label, showarrow: false, font: {color: colour(trace.colour), size: 12.5}, xref: "paper", yref: "paper", xanchor: "left", yanchor: "middle",
    // Among dots a name is read only on a ground of its own.
    ...(trace.kind === "ring" ? {bgcolor: colour("paper"), opacity: 0.85, borderpad: 1} : {}),
    x: Math.min(1, left / x._length), xshift: 8, y: 1 - top / height,
  })));
}

function draw(name) {
  const figure = FIGURES[name], index = chosenView[name] || 0, view = figure.views[index], plot = document.getElementById(name);
  const traces = figure.traces.map(trace => drawn(figure, trace, view, index));
  const config = {responsive: true, displaylogo: false, displayModeBar: figure.rows ? false : "hover",
                  // Named one by one: by default there is a button that sends the figure to a server.
                  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], plotlyServerURL: "",
                  doubleClick: "reset"};
  return Plotly.react(plot, traces, layout(figure, view), config).then(() => label(plot, figure, view)).then(() => {
    if (plot.dataset.listens) return;
    plot.dataset.listens = "yes";
    plot.on("plotly_relayout", changed => {
      // Labels move with a zoom or a new width, not with the labels that are set below.
      if (!("annotations" in changed)) label(plot, figure, figure.views[chosenView[name] || 0]);
    });
  });
}

const label = (plot, figure, view) => Plotly.relayout(plot, {annotations: directLabels(plot, figure, view)});
const drawAll = () => Promise.all(Object.keys(FIGURES).map(draw));

for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const run = Number(chip.dataset.run), isShown = hiddenRuns.has(run);
    isShown ? hiddenRuns.delete(run) : hiddenRuns.add(run);
    chip.setAttribute("aria-pressed", String(isShown));
    drawAll();
  });
}
for (const fieldset of document.querySelectorAll(".switch")) {
  fieldset.addEventListener("change", event => {
    chosenView[fieldset.dataset.figure] = Number(event.target.value);
    draw(fieldset.dataset.figure);
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let wasNarrow = isNarrow();
window.addEventListener("resize", () => {
  if (isNarrow() !== wasNarrow) { wasNarrow = isNarrow(); drawAll(); }
});
drawAll().then(() => { document.documentElement.dataset.drawn = "yes"; });
