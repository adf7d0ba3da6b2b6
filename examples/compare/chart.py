"""The pictures: score against learning rate, and what is between Muon and others by width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from examples.compare.cells import Comparison
from examples.compare.ladder import CONTENDERS
from examples.compare.methods import METHODS
from examples.compare.noise import difference
from weyl_megatron.report.charts import Axis, Chart, Line
from weyl_megatron.report.sheet import sheet

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


@dataclass(frozen=True)
class WidthAxis(Axis):
    """Logarithmic, with a tick at every width."""

    widths: tuple[int, ...] = ()

    def ticks(self, wanted: int) -> list[tuple[float, str]]:  # noqa: ARG002
        return [(width, str(width)) for width in self.widths]


def draw_widths(rungs: Sequence[Comparison]) -> str:
    """How far above Muon each method ends, with standard errors, a chart per norm."""
    legend = [_line(name, [], []) for name in CONTENDERS]
    by_norm = [list(group) for _, group in groupby(rungs, key=lambda each: each.cell.norm)]
    lines = [[_above_muon(name, group) for name in CONTENDERS] for group in by_norm]
    ends = [
        end for group in lines for line in group if line.band for band in line.band for end in band
    ]
    low, high = math.floor(20 * min([0.0, *ends])) / 20, math.ceil(20 * max([0.05, *ends])) / 20
    widths = tuple(sorted({each.cell.width for each in rungs}))
    charts = [
        Chart(
            title=f"GPT, {group[0].cell.norm}-LN, {group[0].cell.depth} layers",
            x=WidthAxis("width", widths[0] / 1.2, widths[-1] * 1.2, True, widths),
            y=Axis("loss above Muon's, nats", low, high),
            lines=curves,
            width=WIDTH,
            height=HEIGHT,
            right=14,
        )
        for group, curves in zip(by_norm, lines, strict=True)
    ]
    return sheet([charts], legend, len(charts))


def _above_muon(name: str, rungs: Sequence[Comparison]) -> Line:
    x, y, below, above = [], [], [], []
    for each in rungs:
        entry, muon = each.best_entry(name), each.best_entry("muon")
        if entry is None or muon is None:
            continue
        apart = difference(entry.scores, muon.scores)
        error = 0.0 if math.isnan(apart.error) else apart.error
        x.append(each.cell.width)
        y.append(apart.mean)
        below.append(y[-1] - error)
        above.append(y[-1] + error)
    return replace(_line(name, x, y), band=(below, above))
