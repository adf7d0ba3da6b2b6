"""The training runs as one SVG, in the house's charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from weyl_megatron.report.charts import Chart, Line
from weyl_megatron.report.curves import Range
from weyl_megatron.report.sheet import sheet


@dataclass
class Curve:
    """What was logged of a run, at the same steps as of the others."""

    name: str
    color: str
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    clipped: list[float | None] = field(default_factory=list)

    def add(self, step: int, loss: float, seconds: float, clipped: float | None) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.clipped.append(clipped)

    def line(self, x: Sequence[float], y: Sequence[float]) -> Line:
        return Line(self.name, x, y, self.color)


def draw(curves: Sequence[Curve]) -> str:
    """Return an `<svg>`: the training loss by steps and by seconds, and the share of matrices that
    AdamW² clipped; a loss that is not finite is a gap.
    """
    losses = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    loss = Range("training loss, nats a token", low, max(high, low + 0.1))
    steps = Range("steps", 0, max(step for curve in curves for step in curve.steps))
    seconds = Range("seconds", 0, max(each for curve in curves for each in curve.seconds))
    share = Range("share of matrices clipped", 0, 1)
    charts = [
        _chart(steps, loss, [curve.line(curve.steps, curve.losses) for curve in curves]),
        _chart(seconds, loss, [curve.line(curve.seconds, curve.losses) for curve in curves]),
        _chart(
            steps,
            share,
            [
                curve.line(curve.steps, [each for each in curve.clipped if each is not None])
                for curve in curves
                if None not in curve.clipped
            ],
        ),
    ]
    return sheet([charts], [curve.line([], []) for curve in curves], columns=3)


def _chart(x: Range, y: Range, lines: Sequence[Line]) -> Chart:
    return Chart("", x, y, lines, width=420, height=260)
