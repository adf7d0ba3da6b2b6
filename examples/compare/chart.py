"""The picture: score against learning rate, a curve per method, a chart per cell of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from examples.compare.methods import METHODS
from weyl_megatron.report.charts import Axis, Chart, Line
from weyl_megatron.report.sheet import sheet

if TYPE_CHECKING:
    from examples.compare.table import Comparison

WIDTH, HEIGHT, COLUMNS = 340, 230, 3

#: The losses shown: a GPT that learns only how often each byte occurs ends at 3.19; worse is off
#: the chart.
WORST_LOSS = 3.3


def draw(cells: Sequence[Comparison]) -> str:
    """The whole picture as one SVG; where there is one rate only, there is no curve to draw."""
    cells = [comparison for comparison in cells if len(comparison.rates) > 1] or cells
    present = [name for name in METHODS if any(name in cell.methods for cell in cells)]
    legend = [_line(name, [], []) for name in present]
    rows = [[_chart(comparison, cells) for comparison in row] for row in _rows(cells)]
    return sheet(rows, legend, COLUMNS)


def _rows(cells: Sequence[Comparison]) -> list[Sequence[Comparison]]:
    """The charts in rows; another task or β₂ starts a new one."""
    rows: list[Sequence[Comparison]] = []
    for _, group in groupby(cells, key=lambda comparison: comparison.cell[:2]):
        alike = list(group)
        rows += [alike[start : start + COLUMNS] for start in range(0, len(alike), COLUMNS)]
    return rows


def _chart(comparison: Comparison, cells: Sequence[Comparison]) -> Chart:
    cell, rates = comparison.cell, comparison.rates
    lines = [
        _line(name, rates, [comparison.mean(name, rate) for rate in rates])
        for name in comparison.methods
    ]
    if cell.score == "accuracy":
        y = Axis("accuracy", 0, 1)
    else:
        # One axis for all charts of a task, so that depths and norms can be compared.
        bests = (other.best() for other in cells if other.cell.task == cell.task)
        best = min(bests, default=math.nan)
        low = math.floor(10 * best) / 10 if math.isfinite(best) else 0.0
        y = Axis("validation loss, nats", low, max(WORST_LOSS, low + 1))
    return Chart(
        title=cell.title,
        x=Axis("learning rate", rates[0] / 1.3, rates[-1] * 1.3, log=True),
        y=y,
        lines=lines,
        width=WIDTH,
        height=HEIGHT,
        right=14,
    )


def _line(name: str, x: Sequence[float], y: Sequence[float]) -> Line:
    """A method's curve: AdamW² is drawn thick, what has a warmup dashed."""
    method = METHODS[name]
    width = 2.75 if name.startswith("adamw2") else 1.5
    return Line(method.title, x, y, method.color, dashed=method.warmup != 0, width=width)
