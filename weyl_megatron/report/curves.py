"""Curves of what was logged: their axes, gaps, colours and names, the same on all pages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .charts import Axis, Chart, Line, Rule, depth_color, smooth
from .groups import Band, Place
from .page import figure_of_run, legend
from .points import Points, evenly, stretches, thin
from .run import Run, matrix_place

POINTS = 300  # of a curve at most
HEADS = 256  # of a run that have a curve each; of more, each block has one
_PAGE_POINTS = 400_000  # of all curves of a page, about; twelve bytes each
_LEAST_POINTS = 10  # of a curve, however many there are
_STEPS = 5_000  # that the page's script knows
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
        """The steps at which anything was logged; of very many some, the ends among them."""
        steps = {step for each in self.runs for step in each.table.steps}
        steps |= {kept.step for each in self.runs for kept in each.maps}
        steps |= {spike.step for each in self.runs for spike in each.spikes}
        return evenly(sorted(steps or {1}), _STEPS)

    @cached_property
    def depth(self) -> int:
        """How many blocks there are."""
        numbers = (re.match(r"block/(\d{1,6})/", tag) for each in self.runs for tag in each.series)
        return 1 + max((int(number[1]) for number in numbers if number), default=0)

    @cached_property
    def most(self) -> int:
        """How many points a curve may have, so that all of them fit on the page."""
        drawn = sum(map(_count_curves, self.runs))
        return min(POINTS, max(_LEAST_POINTS, _PAGE_POINTS // max(1, drawn)))

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

    def curves(
        self,
        series: Mapping[Place, Points],
        name: Callable[[Place], str],
        color: Callable[[Place], str],
        width: float = 1.25,
    ) -> list[Line]:
        """The curves of several places."""
        return [
            line
            for place, points in series.items()
            for line in curve(name(place), points, color(place), width, most=self.most)
        ]

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


def _count_curves(each: Run) -> int:
    """About how many curves a run has on the page; a band counts as three."""
    of_heads = re.compile(r"block/\d+/head/|clip/.*/(?!lr$)[^/]*$")
    single = sum(of_heads.match(tag) is None for tag in each.series)
    single += 3 * len({block for block, _ in each.heads("entropy")})
    for name in ("sec", "effective_rank", "max_logit", "max_logit_mean", "max_logit_bound"):
        heads = each.heads(name)
        single += len({block for block, _ in heads}) if len(heads) > HEADS else len(heads)
    return single


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


def trend(
    name: str,
    points: Points,
    color: str,
    reach: int,
    most: int = POINTS,
    means: Points | None = None,
) -> list[Line]:
    """A curve that is smoothed over `reach` points to either side, the single ones faint behind.

    `means` are what is smoothed, where it is not the points.
    """
    smoothed: Points = []
    for stretch in stretches(points if means is None else means):
        values = smooth([value for _, value in stretch], reach)
        smoothed.append((stretch[0][0] - 1, None))
        smoothed += zip((step for step, _ in stretch), values, strict=True)
    single = curve(name, points, color, most=most)
    behind = [replace(line, faint=True, width=0.75) for line in single]
    return [*behind, *curve(name, smoothed, color, 2.25, most=most)]


def bands_of(series: Iterable[Points]) -> list[tuple[int, Band | None]]:
    """The mean and the range of several series at every step; None where all are gaps."""
    numbers: dict[int, list[float]] = {}
    for points in series:
        for step, value in points:
            numbers.setdefault(step, []).extend([] if value is None else [value])
    return [
        (step, Band(min(values), sum(values) / len(values), max(values)) if values else None)
        for step, values in sorted(numbers.items())
    ]


def banded(
    name: str, bands: Sequence[tuple[int, Band | None]], color: str, most: int = POINTS
) -> list[Line]:
    """The mean of several series, and their range as a band."""
    # The mean and both edges have their points at the same steps: they are not thinned apart.
    length = math.ceil(len(bands) / most)
    joined = [_joined(bands[at : at + length]) for at in range(0, len(bands), length)]
    split: list[list[tuple[int, Band]]] = [[]]
    for step, band in joined:
        if band is None:
            split.append([])
        else:
            split[-1].append((step, band))
    lines = []
    for stretch in filter(None, split):
        drawn = curve(name, [(step, band.mean) for step, band in stretch], color, most=most)
        edges = [band.low for _, band in stretch], [band.high for _, band in stretch]
        lines += [replace(line, band=edges) for line in drawn] if len(stretch) > 1 else drawn
    return lines


def _joined(bands: Sequence[tuple[int, Band | None]]) -> tuple[int, Band | None]:
    """Bands that follow each other as one: the whole range, and the mean of their means."""
    step = bands[len(bands) // 2][0]
    there = [band for _, band in bands if band is not None]
    if not there:
        return step, None
    mean = sum(band.mean for band in there) / len(there)
    return step, Band(min(band.low for band in there), mean, max(band.high for band in there))


def rate_curves(
    rates: Mapping[str, Points],
    schedule: Points,
    name: Callable[[int], str],
    color: Callable[[int], str],
    most: int = POINTS,
) -> dict[str, list[Line]]:
    """The rates of the matrices of each kind, over the dashed schedule.

    Args:
        rates: by matrix.
        schedule: the rate before the clip.
        name: of a block.
        color: of a block.
        most: points of a curve.
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
            most=most,
        )
    return kinds


def block_name(block: int) -> str:
    return f"block {block}"


def head_name(place: tuple[int, int]) -> str:
    return f"block {place[0]}, head {place[1]}"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
