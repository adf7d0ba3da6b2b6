"""All numbers of a run in bounded memory, however long it is.

Up to `BUCKETS` measurements each is kept as it is. Of more, a bucket stands for 2, 4, 8, … of them
that follow each other and keeps, of every series, the lowest and the highest number and where they
were, the last, the mean, and whether there was a gap. So no extreme is lost.

`Builder` takes measurements one by one and gives a `Table`, of which `groups` are parts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .points import Points

#: Measurements that are kept as they are; of more, pairs are one, then pairs of these.
BUCKETS = 300

#: From here on a number is a gap: a chart's range would overflow.
LARGEST = 1e300

Values = Mapping[str, float | None]  # of a measurement, by tag; None is a gap

_ABSENT = math.inf  # of a series that a measurement does not have; no number is as large
_WORST, _NEXT = 2.0, 3.0  # the modes' numbers of malignant collapse and of uniform attention


@dataclass
class _Bucket:
    """Measurements that follow each other; of every series, or of all buckets, a column each.

    Where a measurement is known by its number; -1 is none.
    """

    low: Tensor
    high: Tensor
    total: Tensor
    last: Tensor  # NaN where it was a gap
    low_at: Tensor
    high_at: Tensor
    last_at: Tensor
    gap_at: Tensor
    numbers: Tensor  # how many there are

    def padded(self, size: int) -> _Bucket:
        """This bucket with further series, of which it has nothing."""
        more = size - len(self.low)
        if not more:
            return self
        nothing = _bucket(torch.full((more,), _ABSENT, dtype=torch.float64), 0)
        pairs = ((getattr(self, key), getattr(nothing, key)) for key in _KEYS)
        return _Bucket(*map(torch.cat, pairs))


_KEYS = [each.name for each in fields(_Bucket)]


def _bucket(numbers: Tensor, at: int) -> _Bucket:
    """One measurement, the `at`-th."""
    is_number = torch.isfinite(numbers)
    is_absent = numbers == _ABSENT
    nowhere = torch.full(numbers.shape, -1, dtype=torch.int32)
    here = torch.where(is_number, at, nowhere)
    return _Bucket(
        low=torch.where(is_number, numbers, math.inf),
        high=torch.where(is_number, numbers, -math.inf),
        total=torch.where(is_number, numbers, 0.0),
        last=torch.where(is_absent, math.nan, numbers),
        low_at=here,
        high_at=here,
        last_at=torch.where(is_absent, nowhere, at),
        gap_at=torch.where(torch.isnan(numbers), at, nowhere),
        numbers=is_number.to(torch.int32),
    )


def _joined(first: _Bucket, second: _Bucket) -> _Bucket:
    """Both as one; `second` is the later one."""
    first = first.padded(len(second.low))
    is_lower, is_higher = second.low < first.low, second.high > first.high
    has_last = second.last_at >= 0
    return _Bucket(
        low=torch.where(is_lower, second.low, first.low),
        high=torch.where(is_higher, second.high, first.high),
        total=first.total + second.total,
        last=torch.where(has_last, second.last, first.last),
        low_at=torch.where(is_lower, second.low_at, first.low_at),
        high_at=torch.where(is_higher, second.high_at, first.high_at),
        last_at=torch.where(has_last, second.last_at, first.last_at),
        gap_at=torch.where(first.gap_at >= 0, first.gap_at, second.gap_at),
        numbers=first.numbers + second.numbers,
    )


class Builder:
    """Takes measurements in the order of their steps.

    Args:
        read: a measurement's values once more, from where it was said to be; for a run that is
            started again.
    """

    def __init__(self, read: Callable[[int], Values]) -> None:
        self.steps: list[int] = []
        self.places: list[list[int]] = []  # where each measurement was read
        self._read = read
        self._rows: dict[str, int] = {}
        self._buckets: list[_Bucket] = []
        self._length = 1  # measurements of a bucket; the last may have fewer
        self._newest: dict[str, float | None] | None = None  # goes on while its step does
        self._first = torch.empty(0, dtype=torch.float64)
        self._first_at = torch.empty(0, dtype=torch.int32)
        self._tags: list[str] = []  # of the last measurement, their rows, and which are modes
        self._tags_rows = torch.empty(0, dtype=torch.long)
        self._tags_modes = torch.empty(0, dtype=torch.bool)

    def add(self, step: int, values: Values, place: int) -> None:
        """Take a measurement; what is of the last one's step belongs to that."""
        if self._newest is not None and self.steps[-1] == step:
            self._newest.update(values)
            self.places[-1].append(place)
            return
        self._flush()
        self.steps.append(step)
        self.places.append([place])
        self._newest = dict(values)

    def drop(self, step: int) -> None:
        """Forget what is of this step and of later ones."""
        self._flush()
        kept = bisect_left(self.steps, step)
        whole = kept // self._length
        again = list(zip(self.steps[:kept], self.places, strict=False))[whole * self._length :]
        del self._buckets[whole:], self.steps[whole * self._length :]
        del self.places[whole * self._length :]
        self._first_at = torch.where(self._first_at < len(self.steps), self._first_at, -1)
        for earlier, places in again:
            for place in places:
                self.add(earlier, self._read(place), place)

    def table(self) -> Table:
        """All series; nothing is added afterwards."""
        self._flush()
        size = len(self._rows)
        padded = [bucket.padded(size) for bucket in self._buckets]
        self._buckets = []
        columns: dict[str, Tensor] = {}
        for key in _KEYS:  # one after the other, so that none is in memory twice
            column = [getattr(bucket, key) for bucket in padded]
            columns[key] = torch.stack(column, 1) if column else torch.empty(size, 0)
            for bucket in padded:
                setattr(bucket, key, None)
        rows = {tag: row for tag, row in self._rows.items() if int(self._first_at[row]) >= 0}
        columns_of_all = _Bucket(**columns)
        return Table(self.steps, rows, self._length, columns_of_all, self._first, self._first_at)

    def _flush(self) -> None:
        """Put the newest measurement into its bucket."""
        if self._newest is None:
            return
        numbers, self._newest = self._vector(self._newest), None
        at = len(self.steps) - 1
        is_new = (self._first_at < 0) & (numbers != _ABSENT)
        self._first = torch.where(is_new, numbers, self._first)
        self._first_at = torch.where(is_new, at, self._first_at)
        bucket = _bucket(numbers, at)
        if at % self._length:
            self._buckets[-1] = _joined(self._buckets[-1], bucket)
        else:
            self._buckets.append(bucket)
        if len(self._buckets) > BUCKETS:
            pairs = zip(self._buckets[::2], [*self._buckets[1::2], None], strict=False)
            self._buckets = [
                first if second is None else _joined(first, second) for first, second in pairs
            ]
            self._length *= 2

    def _vector(self, values: Values) -> Tensor:
        """A number for every series, in the order of their rows."""
        tags = list(values)
        if tags != self._tags:
            rows = [self._rows.setdefault(tag, len(self._rows)) for tag in tags]
            self._tags, self._tags_rows = tags, torch.tensor(rows, dtype=torch.long)
            self._tags_modes = torch.tensor([is_mode(tag) for tag in tags], dtype=torch.bool)
            more = len(self._rows) - len(self._first)
            self._first = torch.cat([self._first, torch.zeros(more, dtype=torch.float64)])
            self._first_at = torch.cat([self._first_at, -torch.ones(more, dtype=torch.int32)])
        measured = torch.tensor(
            [math.nan if value is None else value for value in values.values()],
            dtype=torch.float64,
        )
        measured[self._tags_modes] = ranked(measured[self._tags_modes])
        numbers = torch.full((len(self._rows),), _ABSENT, dtype=torch.float64)
        numbers[self._tags_rows] = torch.where(measured.abs() < LARGEST, measured, math.nan)
        return numbers


def is_mode(tag: str) -> bool:
    """Whether a series is of modes, whose numbers are in no order."""
    return tag.endswith("/mode")


def ranked(modes: Tensor) -> Tensor:
    """Modes so that the highest is the worst; and back."""
    worst, second = modes == _WORST, modes == _NEXT
    return torch.where(worst, _NEXT, torch.where(second, _WORST, modes))


class Table:
    """All series of a run, in buckets."""

    def __init__(
        self,
        steps: Sequence[int],
        rows: Mapping[str, int],
        length: int,
        columns: _Bucket,
        first: Tensor,
        first_at: Tensor,
    ) -> None:
        self.steps = steps
        self.rows = rows
        self.length = length  # measurements of a bucket
        self._columns = columns
        modes = [row for tag, row in rows.items() if is_mode(tag)]
        for column in (columns.low, columns.high, columns.last, first):
            column[modes] = ranked(column[modes])
        self._first, self._first_at = first.tolist(), first_at.tolist()

    def points(self, tag: str) -> Points:
        """A series: all of it, or of each bucket the lowest, the highest and a gap."""
        row, columns = self.rows[tag], self._columns
        first, at = self._first[row], self._first_at[row]
        kept: dict[int, float | None] = {at: first if math.isfinite(first) else None}
        for place in columns.gap_at[row].tolist():
            kept[place] = None
        for key in ("low", "high"):
            places = getattr(columns, f"{key}_at")[row].tolist()
            kept.update(zip(places, getattr(columns, key)[row].tolist(), strict=True))
        at, last = self._last_at(row)
        kept[at] = last
        kept.pop(-1, None)
        return [(self.steps[place], kept[place]) for place in sorted(kept)]

    def last(self, tag: str) -> tuple[int, float | None]:
        """The last step of a series, and its number."""
        at, value = self._last_at(self.rows[tag])
        return self.steps[at], value

    def _last_at(self, row: int) -> tuple[int, float | None]:
        places = self._columns.last_at[row]
        bucket = int(places.argmax())
        value = float(self._columns.last[row, bucket])
        return int(places[bucket]), value if math.isfinite(value) else None

    @property
    def middles(self) -> list[int]:
        """The step in the middle of each bucket."""
        starts = range(0, len(self.steps), self.length)
        ends = (min(start + self.length, len(self.steps)) for start in starts)
        return [self.steps[(start + end - 1) // 2] for start, end in zip(starts, ends, strict=True)]

    def column(self, key: str, tags: Sequence[str]) -> Tensor:
        """`"low"`, `"high"`, `"total"`, … of some series: a row each, a column a bucket."""
        column: Tensor = getattr(self._columns, key)
        return column[[self.rows[tag] for tag in tags]]
