"""The page of watched runs: its layout, its colours in light and dark, the values under the
pointer, the scrubber.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from .style import STYLE

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
"""
    + STYLE
    + """:root {
  --accent: #0f8a78;
  --run-0: #c8452d; --run-1: #0f8a78; --run-2: #5b4bd6; --run-3: #6b7280;
  --run-4: #a66a00; --run-5: #2f6fd0; --run-6: #b0398f; --run-7: #4d7c0f;
  --mode-0: #0f8a78; --mode-1: #5b4bd6; --mode-2: #c8452d; --mode-3: #d99a1c;
  --low: #c8452d; --middle: #ecebe6; --high: #2f6fd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --accent: #3cc4ae;
    --run-0: #f0745c; --run-1: #3cc4ae; --run-2: #9d92ff; --run-3: #a3aab5;
    --run-4: #e0a84a; --run-5: #79a8f5; --run-6: #e583c8; --run-7: #9ccb5c;
    --mode-0: #3cc4ae; --mode-1: #9d92ff; --mode-2: #f0745c; --mode-3: #f0c25c;
    --low: #f0745c; --middle: #33363d; --high: #79a8f5;
  }
}
h3 { font-size: 15px; margin: 20px 0 6px; overflow-wrap: anywhere; }
.grid { display: grid; gap: 18px; }
.grid.of-1 { grid-template-columns: minmax(0, 1fr); }
.grid.of-2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.grid.of-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.grid.of-4 { grid-template-columns: repeat(4, minmax(0, 1fr)); }
figure.of-run { border-top: 3px solid var(--run); padding-top: 8px; }
.name { font-size: 13px; font-weight: 600; margin: 0 0 6px; overflow-wrap: anywhere; }
.legend span { overflow-wrap: anywhere; min-width: 0; }
svg .faint { opacity: .25; }
#values { position: fixed; pointer-events: none; display: none; background: var(--card); border: 1px solid var(--edge);
  border-radius: 6px; padding: 7px 10px; font-size: 12px; line-height: 1.5; box-shadow: 0 4px 16px rgb(0 0 0 / .16);
  font-variant-numeric: tabular-nums; z-index: 9; max-width: 420px; }
#values th { font-weight: 400; text-align: left; overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table.runs th, table.runs td { padding: 8px 12px; border-bottom: 1px solid var(--edge); text-align: right;
  vertical-align: top; }
table.runs tbody tr:last-child > * { border-bottom: 0; }
table.runs th:first-child, table.runs td.text { text-align: left; overflow-wrap: anywhere; }
table.runs td.text { color: var(--ink-2); }
table.runs th:first-child { min-width: 9em; }
table.runs thead th { font-size: 13px; color: var(--ink-3); font-weight: 500; vertical-align: bottom; }
[data-panel=warnings] thead th:last-child { text-align: left; }
table.runs small { display: block; white-space: nowrap; font-size: 12px; color: var(--ink-3); }
.modes { display: inline-grid; grid-template-columns: auto auto; gap: 0 8px; font-size: 13px; text-align: left; }
.modes b { text-align: right; font-weight: 600; }
.modes b, .at-mode { color: var(--mode); }
.heat { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 8px; font-size: 10.5px; color: var(--ink-3); }
.heat canvas { width: 100%; height: 100%; image-rendering: pixelated; border-radius: 3px; display: block; }
.heat .rows { position: relative; min-width: 48px; }
.heat .rows span { position: absolute; right: 0; transform: translateY(-50%); white-space: nowrap; }
.heat .steps { grid-column: 2; display: flex; justify-content: space-between; margin-top: 3px; }
.ramp { display: inline-block; width: 120px; height: 9px; border-radius: 3px; margin: 0 6px; vertical-align: middle;
  background: linear-gradient(90deg, var(--low), var(--middle), var(--high)); }
.scrubber { display: flex; align-items: center; gap: 14px; position: sticky; top: 0; z-index: 2; padding: 10px 0;
  background: var(--page); }
.scrubber input { flex: 1; accent-color: var(--accent); min-width: 0; }
.scrubber button { font: inherit; font-size: 14px; color: var(--ink); background: var(--card); cursor: pointer;
  border: 1px solid var(--edge); border-radius: 6px; padding: 4px 14px; min-width: 84px; }
.scrubber output { font-variant-numeric: tabular-nums; min-width: 7.5em; text-align: right; }
canvas.map { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; border: 1px solid var(--edge); }
.big { max-width: 380px; margin: 0 auto; }
.big p { font-size: 13px; margin: 8px 0 14px; min-height: 3.2em;
  font-variant-numeric: tabular-nums; }
.small { display: grid; gap: 3px; align-items: center; font-size: 10.5px; color: var(--ink-3); }
.small button { padding: 0; margin: 0; border: 2px solid transparent; border-radius: 3px; background: none;
  display: block; cursor: pointer; min-width: 0; width: 100%; }
.small button canvas { border: 0; background: var(--page); }
.small button[aria-pressed=true] { border-color: var(--ink); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
ul { margin: 0 0 12px; padding-left: 1.2em; max-width: 100ch; color: var(--ink-2); overflow-wrap: anywhere; }
@media (max-width: 860px) {
  .grid.of-3, .grid.of-4 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (max-width: 520px) { .grid.of-2, .grid.of-3, .grid.of-4 { grid-template-columns: minmax(0, 1fr); } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
<div id="values"></div>
<script type="application/json" id="steps">$steps</script>
<script type="application/json" id="maps">$maps</script>
<script>
"use strict";
const LISTED = 14;
const MODES = ["normal", "benign collapse", "malignant collapse", "uniform"];
const box = document.getElementById("values");
const told = id => JSON.parse(document.getElementById(id).textContent);
const allSteps = told("steps");
const escaped = text => text.replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
const short = value => value === 0 ? "0" : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5
  ? value.toExponential(2) : String(+value.toPrecision(4));
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = color => [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));
const nearestStep = step => {
  let low = 0, high = allSteps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (allSteps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - allSteps[low - 1] < allSteps[low] - step ? allSteps[low - 1] : allSteps[low];
};

const parsed = new WeakMap();
function pointsOf(line) {
  if (!parsed.has(line)) {
    const pairs = line.getAttribute("points").split(" ").filter(Boolean).map(pair => pair.split(",").map(Number));
    parsed.set(line, pairs.map(([x, y]) => ({x, y})));
  }
  return parsed.get(line);
}
// A curve with gaps is several polylines of one name; of many curves those nearest to the pointer are listed.
function valuesAt(svg, event) {
  const [left, right, top, base] = svg.dataset.box.split(",").map(Number);
  const [x0, x1] = svg.dataset.x.split(",").map(Number);
  const [low, high, scale] = svg.dataset.y.split(",");
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  if (at.x < left || at.x > right) return null;
  const curves = new Map();
  for (const line of svg.querySelectorAll("polyline:not(.faint)")) {
    const key = line.dataset.name + line.style.stroke;
    for (const point of pointsOf(line)) {
      const found = curves.get(key);
      if (!found || Math.abs(point.x - at.x) < Math.abs(found.point.x - at.x)) curves.set(key, {point, line});
    }
  }
  let found = [...curves.values()];
  const cursor = found.length ? found.reduce((a, b) =>
    Math.abs(a.point.x - at.x) <= Math.abs(b.point.x - at.x) ? a : b).point.x : at.x;
  const total = found.length;
  if (total > LISTED)
    found = found.sort((a, b) => Math.abs(a.point.y - at.y) - Math.abs(b.point.y - at.y)).slice(0, LISTED);
  found.sort((a, b) => a.point.y - b.point.y);
  const rows = found.map(({point, line}) => {
    const f = (base - point.y) / (base - top);
    const value = scale === "log" ? low * Math.pow(high / low, f) : +low + f * (high - low);
    return [line.dataset.name, line.style.stroke, short(value)];
  });
  const step = nearestStep(x0 + (cursor - left) / (right - left) * (x1 - x0));
  return {cursor, step, rows, more: total - found.length, top, base};
}
function place(event) {
  box.style.display = "block";
  const overRight = event.clientX + 18 + box.offsetWidth > innerWidth;
  box.style.left = Math.max(4, overRight ? event.clientX - 14 - box.offsetWidth : event.clientX + 18) + "px";
  box.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)) + "px";
}
function show(svg, event) {
  const found = valuesAt(svg, event);
  if (!found || !found.rows.length) return hide(svg);
  let rule = svg.querySelector(".cursor");
  if (!rule) {
    rule = document.createElementNS(svg.namespaceURI, "line");
    rule.setAttribute("class", "cursor");
    svg.append(rule);
  }
  for (const [key, value] of [["x1", found.cursor], ["x2", found.cursor], ["y1", found.top], ["y2", found.base]])
    rule.setAttribute(key, value);
  box.innerHTML = "<b>step " + found.step + "</b><table>" + found.rows.map(([name, color, value]) =>
    "<tr><th><i style='background:" + color + "'></i>" + escaped(name) + "</th><td>" + value + "</td></tr>").join("")
    + "</table>" + (found.more ? "and " + found.more + " farther from the pointer" : "");
  place(event);
}
function hide(svg) {
  box.style.display = "none";
  svg.querySelector?.(".cursor")?.remove();
}
for (const svg of document.querySelectorAll("svg.chart")) {
  svg.addEventListener("pointermove", event => show(svg, event));
  svg.addEventListener("pointerleave", () => hide(svg));
}

// Heat maps: a row a head, a column a step; level 0 is a gap.
function paint(canvas, cols, rows, levels, colorOf) {
  canvas.width = cols;
  canvas.height = rows;
  const image = new ImageData(cols, rows);
  levels.forEach((level, at) => image.data.set(colorOf(level), 4 * at));
  canvas.getContext("2d", {willReadFrequently: true}).putImageData(image, 0, 0);
}
const mixed = (from, to, f) => from.map((value, at) => Math.round(value + (to[at] - value) * f));
function paintHeat(canvas) {
  const levels = bytes(canvas.dataset.levels), cols = canvas.dataset.steps.split(",").length;
  const modes = [0, 1, 2, 3].map(mode => [...rgb(css("--mode-" + mode)), 255]);
  const [low, middle, high] = ["--low", "--middle", "--high"].map(name => rgb(css(name)));
  const ramp = Array.from({length: 256}, (_, level) => {
    const f = (level - 1) / 254 * 2;
    return [...(f < 1 ? mixed(low, middle, f) : mixed(middle, high, f - 1)), 255];
  });
  const colors = canvas.dataset.kind === "mode" ? [, ...modes] : ramp;
  paint(canvas, cols, levels.length / cols, levels, level => level ? colors[level] : [0, 0, 0, 0]);
}
function heatValue(canvas, event) {
  const area = canvas.getBoundingClientRect();
  const col = Math.floor((event.clientX - area.left) / area.width * canvas.width);
  const row = Math.floor((event.clientY - area.top) / area.height * canvas.height);
  if (col < 0 || row < 0 || col >= canvas.width || row >= canvas.height) return hide(canvas);
  const level = bytes(canvas.dataset.levels)[row * canvas.width + col];
  const value = !level ? "no number" : canvas.dataset.kind === "mode" ? MODES[level - 1]
    : short((level - 1) / 254 * canvas.dataset.scale);
  box.innerHTML = "<b>step " + canvas.dataset.steps.split(",")[col] + "</b><br>" +
    escaped(canvas.dataset.heads.split("|")[row]) + ": " + value;
  place(event);
}
const heats = document.querySelectorAll(".heat canvas");
for (const canvas of heats) {
  canvas.addEventListener("pointermove", event => heatValue(canvas, event));
  canvas.addEventListener("pointerleave", () => hide(canvas));
}

// The scrubber: at every step each run shows its newest map.
const maps = told("maps");
const slider = document.getElementById("step"), player = document.getElementById("play");
let chosen = maps.runs.length ? maps.runs[0].cells[0] : null;
const cellOf = (run, like) => run.cells.find(cell => cell.block === like.block && cell.head === like.head);
const frameOf = cell => cell && cell.at[+slider.value] >= 0 ? cell.frames[cell.at[+slider.value]] : null;
function paintMap(canvas, cell, frame, color) {
  if (!frame) {
    canvas.width = canvas.height = 1;
    return;
  }
  if (typeof frame.levels === "string") frame.levels = bytes(frame.levels);
  paint(canvas, frame.cols, frame.rows, frame.levels, level => [...color, level]);
}
function drawBig(run, number) {
  const cell = cellOf(run, chosen), frame = frameOf(cell), figure = document.getElementById("big-" + number);
  paintMap(figure.querySelector("canvas"), cell, frame, rgb(css(run.color)));
  const facts = ["block " + chosen.block + ", head " + chosen.head];
  if (!frame) facts.push(cell ? "not logged yet" : "not logged in this run");
  else {
    facts.push("step " + frame.step);
    if (frame.entropy !== null) facts.push("entropy " + short(frame.entropy) + " nats");
    if (frame.map_rank !== null) facts.push("effective rank " + short(frame.map_rank));
  }
  figure.querySelector("p").innerHTML = escaped(facts.join(" · ")) + (frame && frame.mode !== null
    ? " · <b class='at-mode' style='--mode:var(--mode-" + frame.mode + ")'>" + MODES[frame.mode] + "</b>" : "");
}
function drawMaps() {
  if (!chosen) return;
  document.getElementById("at").textContent = "step " + maps.steps[+slider.value];
  maps.runs.forEach((run, number) => {
    drawBig(run, number);
    for (const button of document.querySelectorAll("#small-" + number + " button")) {
      const cell = run.cells[+button.dataset.cell];
      paintMap(button.firstChild, cell, frameOf(cell), rgb(css(run.color)));
      button.setAttribute("aria-pressed", cell.block === chosen.block && cell.head === chosen.head);
    }
  });
}
function mapValue(canvas, run, event) {
  const frame = frameOf(cellOf(run, chosen)), area = canvas.getBoundingClientRect();
  const col = Math.floor((event.clientX - area.left) / area.width * canvas.width);
  const row = Math.floor((event.clientY - area.top) / area.height * canvas.height);
  if (!frame || !(col >= 0 && row >= 0 && col < frame.cols && row < frame.rows)) return hide(canvas);
  box.innerHTML = "row " + (row + 1) + ", column " + (col + 1) + ": "
    + short((frame.levels[row * frame.cols + col] / 255) ** 2);
  place(event);
}
let timer = null;
function stop() {
  clearInterval(timer);
  timer = null;
  player.textContent = "▶ play";
}
if (slider) {
  maps.runs.forEach((run, number) => {
    const canvas = document.querySelector("#big-" + number + " canvas");
    canvas.addEventListener("pointermove", event => mapValue(canvas, run, event));
    canvas.addEventListener("pointerleave", () => hide(canvas));
    for (const button of document.querySelectorAll("#small-" + number + " button"))
      button.addEventListener("click", () => { chosen = run.cells[+button.dataset.cell]; drawMaps(); });
  });
  slider.addEventListener("input", drawMaps);
  player.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value >= +slider.max) slider.value = 0;
    player.textContent = "❚❚ pause";
    drawMaps();
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      drawMaps();
      if (+slider.value >= +slider.max) stop();
    }, 250);
  });
}
function draw() {
  heats.forEach(paintHeat);
  drawMaps();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
</script>
</body>
</html>
"""
)


def section(name: str, title: str, text: str, body: str) -> str:
    """A part of the page; `text` is plain, `body` is HTML."""
    return (
        "<section "
        f'data-panel="{name}"><h2>{escape(title)}</h2><p>{escape(text)}</p>{body}</section>'
    )


def legend(entries: Iterable[tuple[str, str]], more: str = "") -> str:
    """Names and their colours."""
    spans = "".join(f'<span style="--run:{color}">{escape(name)}</span>' for name, color in entries)
    return f'<div class="legend">{spans}{more}</div>'


def grid(columns: int, figures: Iterable[str]) -> str:
    """A card with figures side by side."""
    return f'<div class="card grid of-{columns}">{"".join(figures)}</div>'


def figure(body: str) -> str:
    """One chart."""
    return f"<figure>{body}</figure>"


def figure_of_run(color: str, title: str, body: str, attributes: str = "") -> str:
    """One chart of a run, under its colour; with a title under its name, too."""
    name = f'<div class="name">{escape(title)}</div>' if title else ""
    return f'<figure class="of-run" style="--run:{color}"{attributes}>{name}{body}</figure>'


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """A card with a table of the runs."""
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="card table"><table class="runs"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(color: str, title: str, cells: Iterable[str]) -> str:
    """A run's row; the cells are HTML."""
    return f'<tr style="--run:{color}"><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>'


def cell(text: str, small: str = "", kind: str = "") -> str:
    """A plain cell with a second, smaller line."""
    second = f"<small>{escape(small)}</small>" if small else ""
    return f"<td{f' class={kind!r}' if kind else ''}>{escape(text)}{second}</td>"
