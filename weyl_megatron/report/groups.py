"""Series of one kind, by their places: every head's entropy, every matrix's rate."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from .points import Points
from .series import Table, is_mode, ranked

Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class Peak(Generic[Place]):
    """The largest or the least number of several series."""

    value: float
    step: int
    place: Place


class Band(NamedTuple):
    """What several series have in a bucket."""

    low: float
    mean: float
    high: float


class Group(Mapping[Place, Points]):
    """Series of one kind, by their places; they are put together when they are asked for."""

    def __init__(self, table: Table, tags: Mapping[Place, str]) -> None:
        self._table = table
        self._tags = dict(tags)

    def __getitem__(self, place: Place) -> Points:
        return self._table.points(self._tags[place])

    def __iter__(self) -> Iterator[Place]:
        return iter(self._tags)

    def __len__(self) -> int:
        return len(self._tags)

    def subset(self, places: Sequence[Place]) -> Group[Place]:
        """The series of some places."""
        return Group(self._table, {place: self._tags[place] for place in places})

    def last(self) -> dict[Place, tuple[int, float | None]]:
        """The last step of every series, and its number."""
        return {place: self._table.last(tag) for place, tag in self._tags.items()}

    def largest(self) -> Peak[Place] | None:
        """The largest number of all; None where there is none."""
        return self._peak("high", 1)

    def least(self) -> Peak[Place] | None:
        """The least number of all."""
        return self._peak("low", -1)

    def _peak(self, key: str, sign: int) -> Peak[Place] | None:
        values = sign * self._table.column(key, list(self._tags.values()))
        if not values.numel() or values.max() == -math.inf:
            return None
        row, bucket = divmod(int(values.argmax()), values.shape[1])
        place = list(self._tags)[row]
        at = int(self._table.column(f"{key}_at", [self._tags[place]])[0, bucket])
        return Peak(sign * float(values[row, bucket]), self._table.steps[at], place)

    def lowest(self, most: int) -> tuple[list[int], list[list[float | None]]]:
        """At most so many steps, and of every series the lowest number about each of them."""
        return self._extremes("low", most)

    def highest(self, most: int) -> tuple[list[int], list[list[float | None]]]:
        """The same with the highest; of modes, with the worst."""
        return self._extremes("high", most)

    def _extremes(self, key: str, most: int) -> tuple[list[int], list[list[float | None]]]:
        tags, has_any = list(self._tags.values()), self._has_any()
        columns = self._table.column(key, tags)[:, torch.tensor(has_any, dtype=torch.bool)]
        pairs = zip(self._table.middles, has_any, strict=True)
        steps = [step for step, is_there in pairs if is_there]
        length = math.ceil(len(steps) / most)
        modes = torch.tensor([is_mode(tag) for tag in tags], dtype=torch.bool)
        columns[modes] = ranked(columns[modes])
        sign = 1 if key == "high" else -1
        parts = torch.split(columns, length, 1)
        joined = torch.stack([sign * (sign * part).amax(1) for part in parts], 1)
        joined[modes] = ranked(joined[modes])
        rows = joined.tolist()
        stretches = (steps[at : at + length] for at in range(0, len(steps), length))
        return [stretch[(len(stretch) - 1) // 2] for stretch in stretches], [
            [value if math.isfinite(value) else None for value in row] for row in rows
        ]

    def _has_any(self) -> list[bool]:
        """Which buckets have any of the series."""
        last_at = self._table.column("last_at", list(self._tags.values()))
        return (last_at >= 0).any(0).tolist()

    def mean(self) -> float | None:
        """The mean of all numbers."""
        tags = list(self._tags.values())
        numbers = int(self._table.column("numbers", tags).sum())
        return float(self._table.column("total", tags).sum()) / numbers if numbers else None

    def bands(self) -> list[tuple[int, Band | None]]:
        """Of every bucket that has any of them their mean and range; None where all are gaps."""
        tags = list(self._tags.values())
        keys = ("low", "high", "total", "numbers")
        low, high, total, numbers = (self._table.column(key, tags) for key in keys)
        means = (total.sum(0) / numbers.sum(0)).tolist()
        bands = map(Band, low.amin(0).tolist(), means, high.amax(0).tolist())
        return [
            (step, band if math.isfinite(band.mean) else None)
            for step, band, is_there in zip(
                self._table.middles, bands, self._has_any(), strict=True
            )
            if is_there
        ]

    def means(self) -> Points:
        """The mean of every bucket; a gap where all are gaps."""
        return [(step, None if band is None else band.mean) for step, band in self.bands()]
