"""Curves as points: what is kept of them where there are more than a page shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

Points = list[tuple[int, float | None]]  # by step; None is a gap


def thin(points: Points, most: int) -> Points:
    """At most `most` of the points, the first and the last among them.

    Of each stretch of the others: the lowest, the highest and a gap.
    """
    if len(points) <= most:
        return points
    inner = points[1:-1]
    of_a_stretch = 3 if any(value is None for _, value in inner) else 2
    length = math.ceil(len(inner) / max(1, (most - 2) // of_a_stretch))
    kept = [points[0], points[-1]]
    for start in range(0, len(inner), length):
        stretch = inner[start : start + length]
        numbers = [(value, step) for step, value in stretch if value is not None]
        kept += [(step, value) for value, step in {min(numbers), max(numbers)}] if numbers else []
        kept += [point for point in stretch if point[1] is None][:1]
    return sorted(kept, key=lambda point: point[0])


def stretches(points: Points) -> list[list[tuple[int, float]]]:
    """The points between the gaps."""
    split: list[list[tuple[int, float]]] = [[]]
    for step, value in points:
        if value is None:
            split.append([])
        else:
            split[-1].append((step, value))
    return [stretch for stretch in split if stretch]


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]
