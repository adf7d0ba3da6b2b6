"""The picture: score against learning rate, a curve per method, a small chart per task, norm, depth
and β₂.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from examples.compare.methods import METHODS
from weyl_megatron.report.charts import Axis, Chart, Line

if TYPE_CHECKING:
    from examples.compare.table import Comparison

WIDTH, HEIGHT, COLUMNS = 340, 250, 3
LEGEND_ROW, GAP = 20, 20

#: What a picture has to bring along to look like the demo's page; it is shown by itself.
STYLE = """
svg { --ink: #1c1d1f; --ink-2: #55585e; --ink-3: #80848b; --line: #ececea; background: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #ecedef; --ink-2: #aeb2ba; --ink-3: #868b94; --line: #282b31; background: #1a1c20; }
}
svg svg { background: none; }
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink-2); }
.title { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
.unit, .tick { fill: var(--ink-3); font-size: 10.5px; }
.grid { stroke: var(--line); }
.axis { stroke: var(--ink-3); }
polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
"""

#: The losses shown: a GPT that learns only how often each byte occurs ends at 3.19, and worse is
#: off the chart.
WORST_LOSS = 3.3


def draw(found: Sequence[Comparison]) -> str:
    """The whole picture as one SVG; where there is one rate only, there is no curve to draw."""
    found = [comparison for comparison in found if len(comparison.rates) > 1] or found
    methods = [name for name in METHODS if any(name in comparison.methods for comparison in found)]
    top = 20 + LEGEND_ROW * math.ceil(len(methods) / COLUMNS)
    rows = _rows(found)
    width, height = WIDTH * COLUMNS, top + HEIGHT * len(rows)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">'
        ),
        f"<style>{STYLE}</style>",
        _legend(methods),
    ]
    for down, row in enumerate(rows):
        for right, comparison in enumerate(row):
            place = (
                f'x="{right * WIDTH}" y="{top + down * HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT - GAP}"'
            )
            parts.append(f"<svg {place}>{_chart(comparison, found).svg()}</svg>")
    return "\n".join([*parts, "</svg>", ""])


def _rows(found: Sequence[Comparison]) -> list[Sequence[Comparison]]:
    """The charts in rows; another task or β₂ starts a new one."""
    rows: list[Sequence[Comparison]] = []
    for _, group in groupby(found, key=lambda comparison: comparison.cell[:2]):
        of_group = list(group)
        rows += [of_group[start : start + COLUMNS] for start in range(0, len(of_group), COLUMNS)]
    return rows


def _legend(methods: Sequence[str]) -> str:
    parts = []
    for number, name in enumerate(methods):
        x, y = 16 + 42 + number % COLUMNS * WIDTH, 20 + number // COLUMNS * LEGEND_ROW
        line = _style(name, "", [], [])
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        stroke = f'style="stroke:{line.color};stroke-width:{line.width}"'
        parts.append(f'<polyline points="{x},{y} {x + 24},{y}" {stroke}{dash}/>')
        parts.append(f'<text x="{x + 32}" y="{y + 4}">{escape(METHODS[name].title)}</text>')
    return "".join(parts)


def _chart(comparison: Comparison, found: Sequence[Comparison]) -> Chart:
    cell, rates = comparison.cell, comparison.rates
    lines = []
    for name in comparison.methods:
        means = [comparison.mean(name, rate) for rate in rates]
        lines.append(_style(name, METHODS[name].title, rates, means))
    if cell.score == "accuracy":
        y = Axis("accuracy", 0, 1)
    else:
        # One axis for all charts of a task, so that depths and norms can be compared.
        best = min(
            (other.best() for other in found if other.cell.task == cell.task), default=math.nan
        )
        low = math.floor(10 * best) / 10 if math.isfinite(best) else 0.0
        y = Axis("validation loss, nats", low, max(WORST_LOSS, low + 1))
    return Chart(
        title=cell.title,
        x=Axis("learning rate", rates[0] / 1.3, rates[-1] * 1.3, log=True),
        y=y,
        lines=lines,
        width=WIDTH,
        height=HEIGHT - GAP,
        right=14,
    )


def _style(name: str, title: str, x: Sequence[float], y: Sequence[float]) -> Line:
    """AdamW² is drawn thick, what has a warmup dashed."""
    method = METHODS[name]
    width = 2.75 if name.startswith("adamw2") else 1.5
    return Line(title, x, y, method.color, dashed=method.warmup != 0, width=width)
