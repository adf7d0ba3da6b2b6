"""What a log holds beside numbers: attention maps, warnings, spikes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .series import LARGEST

_WORST = 3  # matrices of a spike that are kept


@dataclass(frozen=True)
class AttentionMap:
    """One head's attention at one step: a byte for each pair, row by row, 255·√p."""

    step: int
    block: int
    head: int
    rows: int
    cols: int
    levels: bytes


class MapPlace(NamedTuple):
    """A map in the log: what is said of it, and at which byte its line begins."""

    step: int
    block: int
    head: int
    rows: int
    cols: int
    place: int


@dataclass(frozen=True)
class Warned:
    """An early warning as it was given."""

    step: int
    block: int
    head: int
    text: str


class SpikedMatrix(NamedTuple):
    """A matrix whose norm jumped; None is a number that was not finite."""

    name: str
    norm: float | None
    usual: float | None
    z: float | None

    @property
    def severity(self) -> float:
        """How far from usual; without end where the norm was not finite."""
        return math.inf if self.z is None else self.z


class Spike(NamedTuple):
    """A step at which norms jumped: what was done, how many of them did, and the worst."""

    step: int
    action: str  # "log", "skip"
    spiked: int
    matrices: Sequence[SpikedMatrix]  # the worst few, the worst first

    @property
    def severity(self) -> float:
        """Of the worst matrix."""
        return self.matrices[0].severity if self.matrices else -math.inf


def read_map(record: Mapping[str, Any]) -> tuple[int, int, bytes] | str:
    """The rows, columns and levels of a map's line, or what is wrong with it."""
    rows, cols = whole(record.get("rows")), whole(record.get("cols"))
    text = record.get("levels")
    try:
        levels = bytes.fromhex(text if isinstance(text, str) else "?")
    except ValueError:
        return "a map whose levels are not hexadecimal"
    if not rows or not cols or len(levels) != rows * cols:
        return "a map whose levels are not rows × cols"
    return rows, cols, levels


def read_spike(step: int, record: Mapping[str, Any]) -> Spike | str:
    """A spike's line, or what is wrong with it."""
    listed = record.get("matrices")
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        return "a spike without its matrices"
    matrices = [
        SpikedMatrix(
            str(each.get("name", "")),
            number(each.get("norm")),
            number(each.get("usual")),
            number(each.get("z")),
        )
        for each in listed
    ]
    matrices.sort(key=lambda each: each.severity, reverse=True)
    return Spike(step, str(record.get("action", "")), len(matrices), matrices[:_WORST])


def worst_and_last(spikes: Sequence[Spike], count: int) -> list[Spike]:
    """So many of the worst spikes and so many of the last, in the order of their steps."""
    ordered = sorted(range(len(spikes)), key=lambda at: spikes[at].severity, reverse=True)
    kept = {*ordered[:count], *range(len(spikes))[-count:]}
    return [spikes[at] for at in sorted(kept)]


def pooled(kept: AttentionMap, largest: int) -> AttentionMap:
    """The map with at most `largest` rows and columns, each the maximum of those it stands for."""
    rows, cols = min(kept.rows, largest), min(kept.cols, largest)
    if (rows, cols) == (kept.rows, kept.cols):
        return kept
    levels = torch.frombuffer(bytearray(kept.levels), dtype=torch.uint8)
    large = levels.view(1, kept.rows, kept.cols).float()
    small = torch.nn.functional.adaptive_max_pool2d(large, (rows, cols)).to(torch.uint8)
    return replace(kept, rows=rows, cols=cols, levels=bytes(small.flatten().tolist()))


def number(value: Any) -> float | None:
    """A finite number as a float; None for all else, and where a chart's range would overflow."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -LARGEST < value < LARGEST else None


def whole(value: Any) -> int | None:
    """A whole number from 0 on; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < 2**53 else None
