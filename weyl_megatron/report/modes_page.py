"""The page of the three simulated modes: its layout, and its colours in light and dark."""

from string import Template

from .style import STYLE

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Three modes of attention</title>
<style>
"""
    + STYLE
    + """:root {
  --normal: #0f8a78; --benign: #5b4bd6; --malignant: #c8452d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --normal: #3cc4ae; --benign: #9d92ff; --malignant: #f0745c;
  }
}
h2 { font-size: 20px; margin: 40px 0 4px; letter-spacing: -.01em; }
.maps { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; margin: 22px 0 8px; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 16px; margin: 0; }
.maps .card { border-top: 3px solid var(--run); min-width: 0; }
.maps h3 { font-size: 15px; margin: 0 0 10px; }
.maps img { display: block; width: 100%; height: auto; aspect-ratio: 1; border: 1px solid var(--edge); }
figcaption { font-size: 13px; color: var(--ink-2); margin-top: 10px; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: 65fr 51fr; gap: 18px; align-items: start; }
.charts > * { min-width: 0; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
.table { overflow-x: auto; }
.table + p { margin-top: 12px; }
sub { font-size: .7em; line-height: 0; vertical-align: -.25em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 8px 12px; border-bottom: 1px solid var(--edge); text-align: right; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; }
thead th { font-size: 13px; color: var(--ink-3); font-weight: 500; }
tbody th { font-weight: 600; }
tbody th::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  background: var(--run); margin-right: 9px; }
ul { margin: 0 0 12px; padding-left: 1.2em; max-width: 78ch; color: var(--ink-2); }
@media (max-width: 860px) { .maps, .charts { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<main>
<h1>Three modes of attention</h1>
<p class="takeaway">Both collapses have large weights of the same energy, and in both a query looks at hardly more than
one key. Spread over all directions, and alike for queries and keys, the energy makes every token look at itself;
concentrated in $grown of them, it makes all tokens look at the same few.</p>
<div class="maps">$maps</div>
<p>A row is a query, a column a key, both from the first token on. Colour is as dense as the cube root of the
attention, on one scale.</p>

<h2>What decides: the spectrum of W = W<sub>q</sub>ᵀW<sub>k</sub></h2>
<div class="card charts">$spectra$concentration</div>

<h2>The numbers</h2>
<div class="card table"><table>
<thead><tr><th scope="col">mode</th><th scope="col">σ₁(W)</th><th scope="col">‖W‖<sub>F</sub></th>
<th scope="col">SEC($head, $largest)</th><th scope="col">entropy, nats</th><th scope="col">rank of the map</th>
<th scope="col">classified as</th></tr></thead>
<tbody>$rows</tbody>
</table></div>
<p>Uniform attention has $uniform nats. SEC(d<sub>q</sub>, s) is the share of Σσ² that the s
largest singular values have. The rank of a map is the exponential of the entropy of its σ²/Σσ².</p>

<h2>How they are made</h2>
<p>One head, A = softmax(P / √d<sub>q</sub>) with P = XᵀWX, on $tokens tokens of width $width and d<sub>q</sub> = $head,
normal noise behind a LayerNorm (seed $seed). The tokens are the same in all three.</p>
<ul>
<li>Normal: W<sub>q</sub> and W<sub>k</sub> are independent, of variance 1/d.</li>
<li>Benign collapse: W<sub>k</sub> is W<sub>q</sub> and $own of noise of its size, so W is nearly symmetric, positive
and of full rank. Both are scaled until ‖W‖<sub>F</sub> is that of the malignant collapse.</li>
<li>Malignant collapse: the normal W, in which $grown directions have grown to σ = $sigma.</li>
</ul>
<p>After Qi et al., “Taming Transformer Without Using Learning Rate Warmup”, arXiv 2505.21910, Appendix G. The sizes
and numbers are ours.</p>
</main>
</body>
</html>
"""
)
