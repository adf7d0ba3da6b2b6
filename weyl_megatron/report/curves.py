"""The curves of a report: what all charts of a page have in common, their axes, colours and
names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from .charts import Axis, Chart, Line, Rule, depth_color
from .page import figure_of_run, legend
from .runs import Points, Run, evenly, stretches, thin

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
        every, factors = (
            max(1, math.ceil((last - first) / (wanted + 3))),
            (1, 2, 5) if last - first < 3 else (1,),
        )
        values = (
            factor * 10.0**decade for decade in range(first, last + 1, every) for factor in factors
        )
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
        return f"var(--run-{self.runs.index(each) % _COLORS})"

    def block_color(self, block: int) -> str:
        return depth_color(min(block, self.depth - 1), self.depth)

    def legend(self) -> str:
        return legend((each.title, self.color(each)) for each in self.runs)

    def block_legend(self, more: str = "") -> str:
        named = evenly(range(self.depth), _LEGEND)
        return legend(((f"block {block}", self.block_color(block)) for block in named), more)

    def chart(
        self,
        title: str,
        y: Axis,
        lines: Sequence[Line],
        width: int,
        height: int,
        rules: Sequence[Rule] = (),
    ) -> str:
        return Chart(
            title, Range("step", 0, max(1, self.steps[-1])), y, lines, rules, width, height
        ).svg()

    def of_run(self, each: Run, body: str, is_named: bool = False, attributes: str = "") -> str:
        return figure_of_run(self.color(each), each.title if is_named else "", body, attributes)


def axis(
    label: str, series: Iterable[Points], log: bool | None = None, roof: float = math.inf
) -> Axis:
    """A range around all numbers below `roof`; logarithmic as `log` says, or where they span
    much.
    """
    found = [value for points in series for _, value in points if value is not None]
    low, high = min(found, default=0.0), min(max(found, default=1.0), roof)
    positive = [value for value in found if value > 0]
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
    return [
        line
        for place, points in series.items()
        for line in curve(name(place), points, color(place), width)
    ]


def curve(
    name: str, points: Points, color: str, width: float = 1.25, dashed: bool = False
) -> list[Line]:
    """A curve: a line for each stretch between gaps; one that is a point is drawn as a dot."""
    found = []
    for stretch in stretches(thin(points, POINTS)):
        steps, values = zip(*(stretch if len(stretch) > 1 else stretch * 2), strict=True)
        found.append(
            Line(
                name, steps, values, color, dashed=dashed, width=width if len(stretch) > 1 else 3.5
            )
        )
    return found


def block_name(block: int) -> str:
    return f"block {block}"


def head_name(place: tuple[int, int]) -> str:
    return f"block {place[0]}, head {place[1]}"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
