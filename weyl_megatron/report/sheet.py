"""Charts as a picture of their own, for documents: one SVG file with its style in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .charts import Chart, Line
from .page import asset

_LEGEND_ROW = 20  # pixels from one row of the legend to the next
_GAP = 20  # pixels between charts
_LEFT = 16  # pixels from the left of a chart's margin to the legend


def sheet(rows: Sequence[Sequence[Chart]], legend: Sequence[Line], columns: int) -> str:
    """Charts of one size in rows of at most ``columns``, under a legend.

    Args:
        rows: the charts; at least one.
        legend: what the curves of all charts are: each line's stroke and its name.
        columns: of the charts, and of the legend.

    Returns:
        an ``<svg>`` element with a size in pixels; it follows the reader into dark mode.
    """
    first = rows[0][0]
    top = _LEGEND_ROW * (1 + math.ceil(len(legend) / columns))
    width, height = first.width * columns, top + (first.height + _GAP) * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>\n{asset('chart.css')}</style>",
        '<rect width="100%" height="100%" style="fill:var(--card)"/>',
    ]
    for number, line in enumerate(legend):
        down, right = divmod(number, columns)
        x, y = right * first.width + first.margins[2] + _LEFT, _LEGEND_ROW * (1 + down)
        parts.append(f'<polyline points="{x},{y} {x + 24},{y}" {line.stroke()}/>')
        parts.append(f'<text x="{x + 32}" y="{y + 4}">{escape(line.name)}</text>')
    for down, row in enumerate(rows):
        for right, chart in enumerate(row):
            place = f'x="{right * first.width}" y="{top + down * (first.height + _GAP)}"'
            size = f'width="{first.width}" height="{first.height}"'
            parts.append(f"<svg {place} {size}>{chart.svg()}</svg>")
    return "\n".join([*parts, "</svg>", ""])
