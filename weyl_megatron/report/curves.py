"""Curves of what was logged: their axes, gaps, colours and names, the same on all pages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from .charts import Axis, Chart, Line, Rule, depth_color, smooth
from .page import figure_of_run, legend
from .runs import Points, Run, evenly, matrix_place, stretches, thin

Place = TypeVar("Place", bound=Hashable)

POINTS = 300  # of a curve, and columns of a heat map
_LEGEND = 12  # blocks that the legend names
_COLORS = 8  # of runs


@dataclass(frozen=True)
class Range(Axis):
    """An axis whose ticks are short for numbers of every size."""

    def ticks(self, wanted: int) -> list[tuple[float, str]]:
        if not self.log:
            ticks = super().ticks(max(3, wanted))
            return [(value, text if len(text) < 7 else f"{value:g}") for value, text in ticks]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, math.ceil((last - first) / (wanted + 3)))
        factors = (1, 2, 5) if last - first < 3 else (1,)
        decades = range(first, last + 1, every)
        values = (factor * 10.0**decade for decade in decades for factor in factors)
        return [(value, f"{value:g}") for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Shown:
    """The runs of a page, and what their charts have in common."""

    runs: Sequence[Run]
    map_bytes: int  # of all attention maps at most

    @cached_property
    def steps(self) -> list[int]:
        """All steps at which anything was logged."""
        steps = {
            step for each in self.runs for points in each.series.values() for step, _ in points
        }
        return sorted(steps | {kept.step for each in self.runs for kept in each.maps} or {1})

    @cached_property
    def depth(self) -> int:
        """How many blocks there are."""
        numbers = (re.match(r"block/(\d{1,6})/", tag) for each in self.runs for tag in each.series)
        return 1 + max((int(number[1]) for number in numbers if number), default=0)

    @property
    def columns(self) -> int:
        """How many runs stand side by side."""
        return len(self.runs) if len(self.runs) <= 4 else 3

    def color(self, each: Run) -> str:
        return run_color(self.runs.index(each))

    def block_color(self, block: int) -> str:
        return depth_color(min(block, self.depth - 1), self.depth)

    def legend(self) -> str:
        return legend((each.title, self.color(each)) for each in self.runs)

    def block_legend(self, more: str = "") -> str:
        named = evenly(range(self.depth), _LEGEND)
        return legend(((block_name(block), self.block_color(block)) for block in named), more)

    def chart(
        self,
        title: str,
        y: Axis,
        lines: Sequence[Line],
        width: int,
        height: int,
        rules: Sequence[Rule] = (),
    ) -> str:
        x = Range("step", 0, max(1, self.steps[-1]))
        return Chart(title, x, y, lines, rules, width, height).svg()

    def of_run(self, each: Run, body: str, is_named: bool = False, attributes: str = "") -> str:
        return figure_of_run(self.color(each), each.title if is_named else "", body, attributes)


def run_color(number: int) -> str:
    """The colour of a page's run."""
    return f"var(--run-{number % _COLORS})"


def axis(
    label: str, series: Iterable[Points], log: bool | None = None, roof: float = math.inf
) -> Axis:
    """A range around all numbers below `roof`; with `log` None logarithmic where they span much."""
    numbers = [value for points in series for _, value in points if value is not None]
    low, high = min(numbers, default=0.0), min(max(numbers, default=1.0), roof)
    positive = [value for value in numbers if value > 0]
    if log or (log is None and low > 0 and high / low > 30):
        low, high = min(positive, default=0.1), max(positive, default=1.0)
        return Range(label, max(low, high * 1e-12) / 1.25, high * 1.25, log=True)
    low = min(low, high)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Range(label, 0.0 if 0 <= low < 0.35 * high else low - pad, high + pad)


def curves(
    series: Mapping[Place, Points],
    name: Callable[[Place], str],
    color: Callable[[Place], str],
    width: float = 1.25,
) -> list[Line]:
    """The curves of several places."""
    return [
        line
        for place, points in series.items()
        for line in curve(name(place), points, color(place), width)
    ]


def curve(
    name: str,
    points: Points,
    color: str,
    width: float = 1.25,
    dashed: bool = False,
    most: int = POINTS,
) -> list[Line]:
    """A curve of at most `most` points: a line for each stretch between gaps, a dot for a point."""
    lines = []
    for stretch in stretches(thin(points, most)):
        is_dot = len(stretch) == 1
        steps, values = zip(*(stretch * 2 if is_dot else stretch), strict=True)
        lines.append(
            Line(name, steps, values, color, dashed=dashed, width=3.5 if is_dot else width)
        )
    return lines


def trend(name: str, points: Points, color: str, reach: int, most: int = POINTS) -> list[Line]:
    """A curve that is smoothed over `reach` points to either side, the single ones faint behind."""
    smoothed: Points = []
    for stretch in stretches(points):
        values = smooth([value for _, value in stretch], reach)
        smoothed.append((stretch[0][0] - 1, None))
        smoothed += zip((step for step, _ in stretch), values, strict=True)
    single = curve(name, points, color, most=most)
    behind = [replace(line, faint=True, width=0.75) for line in single]
    return [*behind, *curve(name, smoothed, color, 2.25, most=most)]


def by_step(series: Iterable[Points]) -> dict[int, list[float]]:
    """The numbers of several series, by their steps in ascending order."""
    numbers: dict[int, list[float]] = {}
    for points in series:
        for step, value in points:
            numbers.setdefault(step, []).extend([] if value is None else [value])
    return dict(sorted(numbers.items()))


def means(numbers: Mapping[int, Sequence[float]]) -> Points:
    """The mean of every step; a gap where it has no number."""
    return [
        (step, sum(values) / len(values) if values else None) for step, values in numbers.items()
    ]


def banded(name: str, heads: Iterable[Points], color: str) -> list[Line]:
    """The mean of several heads, and their range as a band."""
    of_step = by_step(heads)
    lines = []
    for stretch in stretches(means(of_step)):
        mean_of = dict(stretch)
        steps = evenly(list(mean_of), POINTS)
        band = ([min(of_step[step]) for step in steps], [max(of_step[step]) for step in steps])
        drawn = curve(name, [(step, mean_of[step]) for step in steps], color)
        lines += [replace(line, band=band) for line in drawn] if len(steps) > 1 else drawn
    return lines


def rate_curves(
    rates: Mapping[str, Points],
    schedule: Points,
    name: Callable[[int], str],
    color: Callable[[int], str],
) -> dict[str, list[Line]]:
    """The rates of the matrices of each kind, over the dashed schedule.

    Args:
        rates: by matrix.
        schedule: the rate before the clip.
        name: of a block.
        color: of a block.
    """
    over = curve("schedule", schedule, "var(--ink-3)", 1.0, dashed=True)
    kinds: dict[str, list[Line]] = {}
    for matrix, points in rates.items():
        kind, block = matrix_place(matrix)
        plain = "α" if block is None else name(block)
        lines = kinds.setdefault(kind, list(over))
        lines += curve(
            matrix if "*" in kind else plain,
            points,
            "var(--ink)" if block is None else color(block),
        )
    return kinds


def block_name(block: int) -> str:
    return f"block {block}"


def head_name(place: tuple[int, int]) -> str:
    return f"block {place[0]}, head {place[1]}"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
