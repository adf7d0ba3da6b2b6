"""What all our pages share: paper and ink in light and dark, text, cards, charts and the table of
runs.
"""

STYLE = """:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --edge: #e4e4e0; --grid: #ececea;
  --ink: #1c1d1f; --ink-2: #55585e; --ink-3: #80848b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1a1c20; --edge: #2c2f35; --grid: #282b31;
    --ink: #ecedef; --ink-2: #aeb2ba; --ink-3: #868b94;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 44px 24px 64px; }
h1 { font-size: 34px; line-height: 1.15; margin: 0 0 14px; letter-spacing: -.02em; }
h2 { font-size: 20px; margin: 48px 0 4px; letter-spacing: -.01em; }
p { margin: 0 0 12px; max-width: 78ch; color: var(--ink-2); }
p.takeaway { font-size: 18px; color: var(--ink); max-width: 74ch; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 16px; margin: 10px 0; }
figure { margin: 0; min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--ink-2); margin: 0 0 10px; }
.legend span::before { content: ""; display: inline-block; width: 16px; height: 0; border-top: 3px solid var(--run);
  margin-right: 6px; vertical-align: middle; }
.legend .dashed::before { border-top: 1px dashed var(--ink-3); }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink-2); }
svg .title { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
svg .unit, svg .tick { fill: var(--ink-3); font-size: 10.5px; font-variant-numeric: tabular-nums; }
svg .end { font-size: 12.5px; font-weight: 600; }
svg line.grid { stroke: var(--grid); }
svg .axis { stroke: var(--ink-3); }
svg .rule { stroke: var(--ink-2); stroke-dasharray: 2 3; }
svg .lead { stroke: var(--ink-3); fill: none; }
svg polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .band { opacity: .16; }
svg .cursor { stroke: var(--ink-3); stroke-width: 1; }
#values i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px; }
#values td { padding: 0 0 0 12px; text-align: right; }
table.runs { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px; }
table.runs tbody th { font-weight: 600; }
table.runs tbody th::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  background: var(--run); margin-right: 9px; }
"""
