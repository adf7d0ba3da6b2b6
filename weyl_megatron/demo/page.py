"""The report's page: its layout, its colours in light and dark, and the values under the
pointer.
"""

from string import Template

from ..report.style import STYLE

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AdamW² without warmup: the demo</title>
<style>
"""
    + STYLE
    + """:root {
  --adamw: #c8452d; --adamw-warmup: #6b7280; --adamw2: #0f8a78; --adamw2-auto: #5b4bd6;
  --good: #14795f; --bad: #b3361f; --ins: #e3f4ec; --del: #fbe7e3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --adamw: #f0745c; --adamw-warmup: #a3aab5; --adamw2: #3cc4ae; --adamw2-auto: #9d92ff;
    --good: #4cc9a4; --bad: #f0745c; --ins: #17332b; --del: #3a211d;
  }
}
h3 { font-size: 15px; margin: 20px 0 6px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 26px 0 18px; }
.tile { background: var(--card); border: 1px solid var(--edge); border-top: 3px solid var(--run); border-radius: 8px;
  padding: 14px 16px; display: grid; align-content: start; }
.tile b { font-size: 14px; font-weight: 600; color: var(--ink-2); }
.tile strong { font-size: 34px; line-height: 1.25; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile span { font-size: 13px; color: var(--ink-3); }
ul.claims { list-style: none; margin: 0; padding: 0; color: var(--ink-2); font-size: 15px; }
ul.claims li::before { display: inline-block; width: 1.5em; font-weight: 700; }
ul.claims .met::before { content: "✓"; color: var(--good); }
ul.claims .unmet::before { content: "✗"; color: var(--bad); }
.grid { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px 18px; }
svg .faint { opacity: .2; }
#values { position: fixed; pointer-events: none; display: none; background: var(--card); border: 1px solid var(--edge);
  border-radius: 6px; padding: 7px 10px; font-size: 12px; line-height: 1.5; box-shadow: 0 4px 16px rgb(0 0 0 / .16);
  font-variant-numeric: tabular-nums; z-index: 9; }
#values th { font-weight: 400; text-align: left; }
table.runs th, table.runs td { padding: 8px 12px; border-bottom: 1px solid var(--edge); text-align: right; }
table.runs th:first-child { text-align: left; }
table.runs thead th { font-size: 13px; color: var(--ink-3); font-weight: 500; }
table.runs tfoot td, table.runs tfoot th { color: var(--ink-2); border-bottom: 0; font-weight: 400; }
.columns { display: grid; grid-template-columns: 5fr 6fr; gap: 24px; align-items: start; }
pre { margin: 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; }
pre * { display: block; text-decoration: none; white-space: pre; padding: 0 8px; border-radius: 3px; }
pre del { background: var(--del); }
pre ins { background: var(--ins); }
dl { margin: 0; font-size: 14px; }
dt { font-weight: 600; }
dd { margin: 0 0 10px; color: var(--ink-2); }
@media (max-width: 860px) {
  .tiles, .grid { grid-template-columns: repeat(2, 1fr); }
  .columns { grid-template-columns: 1fr; }
}
@media (max-width: 520px) { .grid { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<main>
<h1>$headline</h1>
<p class="takeaway">$takeaway</p>
<div class="tiles">$tiles</div>
<ul class="claims">$claims</ul>

<h2>Loss</h2>
<p>Training loss of the four runs, smoothed, the single steps faint behind. The numbers above are mean losses on
held-out files after the last step. The unigram entropy is the least loss of a model that knows how often each
byte occurs and ignores its context.</p>
<div class="card">$loss</div>

<h2>The rate of every matrix</h2>
<p>AdamW² bounds the rate of each matrix: α = min(schedule, τ σ₁(W) / σ₁(U)), where U is Adam's update. A curve that
runs below the dashed schedule is a matrix being clipped; where they meet, the step is AdamW's.</p>
<div class="legend">$depths</div>
<h3>τ = 0.01: one threshold for all matrices</h3>
<div class="card grid">$rates_paper</div>
<h3>τ = balanced: the hidden matrices share a budget, embeddings and head have their own</h3>
<div class="card grid">$rates_auto</div>

<h2>Attention entropy</h2>
<p>Mean over the heads of a layer, and the range between its heads, on fixed held-out text. At the dotted line every
query looks at all its visible keys alike: attention that stays there has collapsed, and passes on nothing but an
average. Layer 1 reads the raw embeddings, which are too small for its scores to leave zero in any run.</p>
<div class="legend">$legend</div>
<div class="card grid">$entropy</div>

<h2>The numbers</h2>
<div class="card"><table class="runs">
<thead><tr><th scope="col">run</th><th scope="col">warmup steps</th><th scope="col">validation loss</th>
<th scope="col">against warmup</th><th scope="col">matrix-steps clipped</th><th scope="col">time</th></tr></thead>
<tbody>$rows</tbody>
<tfoot><tr><th scope="row">unigram entropy</th><td></td><td>$unigram</td><td></td><td></td><td></td></tr></tfoot>
</table></div>

<h2>The change</h2>
<p>DeepSpeed's configuration of AdamW without warmup, and what AdamW² changes in it. The training script is the
same.</p>
<div class="columns"><div class="card"><pre>$change</pre></div><dl>$facts</dl></div>
</main>
<div id="values"></div>
<script>
"use strict";
const box = document.getElementById("values");
const escaped = text => text.replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
function valuesAt(svg, event) {
  const [left, right, top, base] = svg.dataset.box.split(",").map(Number);
  const [x0, x1] = svg.dataset.x.split(",").map(Number);
  const [low, high, scale] = svg.dataset.y.split(",");
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
  if (at < left || at > right) return null;
  const rows = [];
  let cursor = at;
  for (const line of svg.querySelectorAll("polyline:not(.faint)")) {
    let nearest = null;
    for (const point of line.points)
      if (nearest === null || Math.abs(point.x - at) < Math.abs(nearest.x - at)) nearest = point;
    if (nearest === null) continue;
    cursor = nearest.x;
    const f = (base - nearest.y) / (base - top);
    const value = scale === "log" ? low * Math.pow(high / low, f) : +low + f * (high - low);
    rows.push([line.dataset.name, line.style.stroke, scale === "log" ? value.toExponential(2) : value.toFixed(3)]);
  }
  return {cursor, step: Math.round(x0 + (cursor - left) / (right - left) * (x1 - x0)), rows, top, base};
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
    + "</table>";
  box.style.display = "block";
  const overRight = event.clientX + 18 + box.offsetWidth > innerWidth;
  box.style.left = (overRight ? event.clientX - 14 - box.offsetWidth : event.clientX + 18) + "px";
  box.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)) + "px";
}
function hide(svg) {
  box.style.display = "none";
  svg.querySelector(".cursor")?.remove();
}
for (const svg of document.querySelectorAll("svg.chart")) {
  svg.addEventListener("pointermove", event => show(svg, event));
  svg.addEventListener("pointerleave", () => hide(svg));
}
</script>
</body>
</html>
"""
)
