"""Line charts as inline SVG: axes, reference lines, bands, labels at the line ends.

Colours are CSS values and text takes its colour from the page, so that a chart follows the page
into dark mode. The page's script reads the values under the pointer back from the `data-`
attributes and the polylines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LABEL_GAP = 15.0  # pixels between the labels at the line ends
MARK = 4  # pixels that a mark is wide to either side


@dataclass(frozen=True)
class Axis:
    """A labelled range, linear or logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where `value` lies between `low` (0) and `high` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int) -> list[tuple[float, str]]:
        """About `wanted` round values in the range, and labels; on a log axis the decades."""
        if self.log:
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [(10.0**decade, f"10{_superscript(decade)}") for decade in decades]
        step = _round_step((self.high - self.low) / wanted)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step)))
        return [(number * step, f"{number * step:.{digits}f}") for number in range(first, last + 1)]


@dataclass(frozen=True)
class Line:
    """One curve.

    `band` is a range around it, `label` stands at its end, `faint` makes it a background.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    label: str = ""
    dashed: bool = False
    faint: bool = False
    width: float = 1.5
    band: tuple[Sequence[float], Sequence[float]] | None = None

    def stroke(self) -> str:
        """Its attributes: colour, width and dashes."""
        dashes = ' stroke-dasharray="4 3"' if self.dashed else ""
        return f'style="stroke:{self.color};stroke-width:{self.width}"{dashes}'


@dataclass(frozen=True)
class Rule:
    """A horizontal reference line.

    Its name stands above its right end, or with `at_end` among the lines' labels.
    """

    y: float
    label: str
    at_end: bool = False


@dataclass(frozen=True)
class Mark:
    """A small mark above the axis, at a place along it."""

    x: float
    name: str
    color: str


@dataclass(frozen=True)
class Chart:
    """Curves over two axes. `width` and `height` are in CSS pixels; the SVG scales to its box."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    rules: Sequence[Rule] = ()
    width: int = 260
    height: int = 170
    right: int = 10
    margins: tuple[int, int, int] = (34, 30, 42)  # top, bottom, left
    marks: Sequence[Mark] = ()

    def svg(self) -> str:
        """The chart as an `<svg>` element."""
        top, bottom, left = self.margins
        right, base = self.width - self.right, self.height - bottom
        inner = f'x="{left}" y="{top}" width="{right - left}" height="{base - top}"'
        parts = [
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" ',
            f'aria-label="{escape(self.title or self.y.label)}" ',
            f'data-box="{left},{right},{top},{base}" data-along="{escape(self.x.label)}" ',
            f'data-x="{self.x.low:g},{self.x.high:g}" ',
            f'data-y="{self.y.low:g},{self.y.high:g},{"log" if self.y.log else "linear"}">',
            self._frame(),
            self._axes(),
            *(self._rule(rule) for rule in self.rules),
            f'<svg {inner} viewBox="{left} {top} {right - left} {base - top}">',
            *(self._band(line) for line in self.lines),
            *(self._line(line) for line in self.lines),
            self._marks(),
            "</svg>",
            self._end_labels(),
            "</svg>",
        ]
        return "".join(parts)

    def _px(self, value: float) -> float:
        left = self.margins[2]
        return left + self.x.fraction(value) * (self.width - self.right - left)

    def _py(self, value: float) -> float:
        top, bottom, _ = self.margins
        return self.height - bottom - self.y.fraction(value) * (self.height - bottom - top)

    def _frame(self) -> str:
        top, _, left = self.margins
        end = f'x="{self.width - self.right}" y="{self.height - 3}" text-anchor="end"'
        return (
            f'<text class="title" x="{left}" y="13">{escape(self.title)}</text>'
            f'<text class="unit" x="{left}" y="{top - 7}">{escape(self.y.label)}</text>'
            f'<text class="unit" {end}>{escape(self.x.label)}</text>'
        )

    def _axes(self) -> str:
        top, bottom, left = self.margins
        right, base = self.width - self.right, self.height - bottom
        parts = []
        for value, text in self.y.ticks(max(2, (base - top) // 42)):
            y = self._py(value)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            tick = f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            parts.append(f"{tick}{text}</text>")
        for value, text in self.x.ticks(max(2, (right - left) // 70)):
            x = self._px(value)
            tick = f'<text class="tick" x="{x:.1f}" y="{base + 14}" text-anchor="middle">'
            parts.append(f"{tick}{text}</text>")
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>')
        return "".join(parts)

    def _rule(self, rule: Rule) -> str:
        left, right, y = self.margins[2], self.width - self.right, self._py(rule.y)
        line = f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        if rule.at_end:
            return line
        place = f'x="{right}" y="{y - 5:.1f}" text-anchor="end"'
        return f'{line}<text class="tick" {place}>{escape(rule.label)}</text>'

    def _band(self, line: Line) -> str:
        if line.band is None:
            return ""
        low, high = line.band
        upper = list(zip(line.x, high, strict=True))
        lower = list(zip(line.x, low, strict=True))
        points = self._points([*upper, *reversed(lower)])
        return f'<polygon points="{points}" style="fill:{line.color}" class="band"/>'

    def _line(self, line: Line) -> str:
        faint = ' class="faint"' if line.faint else ""
        points = self._points(list(zip(line.x, line.y, strict=True)))
        return (
            f'<polyline data-name="{escape(line.name)}" points="{points}" {line.stroke()}{faint}/>'
        )

    def _marks(self) -> str:
        """The marks; several of one colour at one pixel are one, which names the first of them."""
        names: dict[tuple[int, str], list[str]] = {}
        for mark in self.marks:
            names.setdefault((round(self._px(mark.x)), mark.color), []).append(mark.name)
        outline = f"{self.height - self.margins[1]}h{2 * MARK}l-{MARK} -{2 * MARK}z"
        return "".join(
            f'<path class="mark" data-at="{x}" '
            f'data-name="{escape(", ".join(named[:3]) + (", …" if named[3:] else ""))}" '
            f'style="fill:{color}" d="M{x - MARK} {outline}"/>'
            for (x, color), named in names.items()
        )

    def _points(self, pairs: Sequence[tuple[float, float]]) -> str:
        drawn = [(x, y) for x, y in pairs if math.isfinite(y) and (y > 0 or not self.y.log)]
        return " ".join(f"{self._px(x):.1f},{self._py(y):.2f}" for x, y in drawn)

    def _end_labels(self) -> str:
        """The names at the ends of the lines, moved apart where they would overlap."""
        x = self.width - self.right
        ends = [(self._py(line.y[-1]), line.label, line.color) for line in self.lines if line.label]
        ends += [(self._py(rule.y), rule.label, "") for rule in self.rules if rule.at_end]
        ends = sorted(end for end in ends if math.isfinite(end[0]))
        parts = []
        places = spread([y for y, _, _ in ends], LABEL_GAP)
        for (y, label, color), place in zip(ends, places, strict=True):
            style = f' style="fill:{color}"' if color else ""
            if color:
                parts.append(f'<circle cx="{x}" cy="{y:.1f}" r="3.5"{style}/>')
            kind = 'class="end"' if color else f'class="end of-rule" data-at="{y:.1f}"'
            at = f'x="{x + 18}" y="{place + 4:.1f}"'
            parts.append(f'<path class="lead" d="M{x + 5} {y:.1f}L{x + 14} {place:.1f}"/>')
            parts.append(f"<text {kind} {at}{style}>{escape(label)}</text>")
        return "".join(parts)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending `places`, moved apart to `gap` or more: close ones about their common centre."""
    groups: list[tuple[list[float], float]] = []
    for place in places:
        groups.append(([place], place))
        while len(groups) > 1 and _first(groups[-1], gap) - _last(groups[-2], gap) < gap:
            members = groups[-2][0] + groups[-1][0]
            groups[-2:] = [(members, sum(members) / len(members))]
    return [
        _first(group, gap) + number * gap for group in groups for number in range(len(group[0]))
    ]


def _first(group: tuple[list[float], float], gap: float) -> float:
    return group[1] - gap * (len(group[0]) - 1) / 2


def _last(group: tuple[list[float], float], gap: float) -> float:
    return group[1] + gap * (len(group[0]) - 1) / 2


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is `step` or more."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours less than `reach` away, in a Hann window."""
    weights = {offset: 1 + math.cos(math.pi * offset / reach) for offset in range(1 - reach, reach)}
    means = []
    for index in range(len(values)):
        near = {
            offset: weight
            for offset, weight in weights.items()
            if 0 <= index + offset < len(values)
        }
        total = sum(weight * values[index + offset] for offset, weight in near.items())
        means.append(total / sum(near.values()))
    return means


def depth_color(layer: int, layers: int) -> str:
    """A layer's colour from blue (first) to orange (last), for light and for dark ground."""
    fraction = layer / max(1, layers - 1)
    return f"hsl({235 + 160 * fraction:.0f} 68% {57 - 5 * fraction:.0f}%)"
