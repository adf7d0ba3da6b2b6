"""One run's log, as it is known once it has been read: see `runs` for how."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from .events import AttentionMap, MapPlace, Spike, Warned, number, read_map
from .groups import Group
from .series import Table


@dataclass(frozen=True)
class Run:
    """One run's log.

    A value that was not a finite number is None; `notes` say what could not be read.
    """

    name: str
    title: str
    header: Mapping[str, Any]
    table: Table
    maps: Sequence[MapPlace]
    warnings: Sequence[Warned]
    spikes: Sequence[Spike]
    notes: Sequence[str]
    log: Path
    places: Mapping[int, Sequence[int]]  # where the log has a step's numbers

    @property
    def is_readable(self) -> bool:
        """Whether anything of the run can be shown."""
        return bool(self.series or self.maps or self.warnings or self.spikes)

    @cached_property
    def series(self) -> Group[str]:
        """All series, by their tags."""
        return Group(self.table, {tag: tag for tag in self.table.rows})

    def last(self, tag: str) -> float | None:
        """The last value under `tag`; None where it was no finite number or there is none."""
        return self.table.last(tag)[1] if tag in self.series else None

    @property
    def head_names(self) -> list[str]:
        """What is known of heads."""
        return list(self._tags.heads)

    @property
    def block_names(self) -> list[str]:
        """What is known of blocks."""
        return list(self._tags.blocks)

    def heads(self, name: str) -> Group[tuple[int, int]]:
        """The series `name` of every head, by (block, head)."""
        tags = self._tags.heads.get(name, {})
        return Group(self.table, dict(sorted(tags.items())))

    def blocks(self, name: str) -> Group[int]:
        """The series `name` of every block."""
        tags = self._tags.blocks.get(name, {})
        return Group(self.table, dict(sorted(tags.items())))

    def matrices(self, name: str) -> Group[str]:
        """What the optimizer said of every matrix, by its name."""
        return Group(self.table, self._tags.matrices.get(name, {}))

    def shares(self) -> Group[str]:
        """The share of clipped matrices, by their kind."""
        return Group(self.table, self._tags.shares)

    def block_shares(self) -> Group[int]:
        """The share of clipped matrices, by block."""
        return Group(self.table, dict(sorted(self._tags.block_shares.items())))

    @property
    def uniform_entropy(self) -> float | None:
        """The entropy of attention that looks at all keys alike."""
        value = number(self.header.get("uniform_entropy"))
        return self.last("uniform_entropy") if value is None else value

    def map_at(self, kept: MapPlace) -> AttentionMap:
        """A map, read from the log."""
        read = read_map(record_at(self.log, kept.place))
        if isinstance(read, str):
            raise _changed(self.log)
        return AttentionMap(kept.step, kept.block, kept.head, *read)

    def numbers_at(self, step: int) -> dict[str, float | None]:
        """All numbers of a step, read from the log: the table may have means alone."""
        values: dict[str, float | None] = {}
        for place in self.places.get(step, ()):
            values |= values_of(record_at(self.log, place))
        return values

    @cached_property
    def _tags(self) -> _Tags:
        return _Tags.of_all(self.table.rows)


@dataclass
class _Tags:
    """Which series there are, by name and place."""

    heads: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)
    blocks: dict[str, dict[int, str]] = field(default_factory=dict)
    matrices: dict[str, dict[str, str]] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    block_shares: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of_all(cls, tags: Mapping[str, int]) -> _Tags:
        """The places of all tags."""
        known = cls()
        for tag in tags:
            if inside := re.fullmatch(r"block/(\d{1,6})/head/(\d{1,6})/(.+)", tag):
                place = int(inside[1]), int(inside[2])
                known.heads.setdefault(inside[3], {})[place] = tag
            elif inside := re.fullmatch(r"block/(\d{1,6})/(.+)", tag):
                known.blocks.setdefault(inside[2], {})[int(inside[1])] = tag
            elif inside := re.fullmatch(r"clip/(.+)/([^/]+)", tag):
                known.matrices.setdefault(inside[2], {})[inside[1]] = tag
            elif inside := re.fullmatch(r"clip_share/(.+)", tag):
                known.shares[inside[1]] = tag
            elif inside := re.fullmatch(r"clip_share_block/(\d{1,6})", tag):
                known.block_shares[int(inside[1])] = tag
        return known


def matrix_place(matrix: str) -> tuple[str, int | None]:
    """A matrix's kind and its block's number; the experts of a block are of one kind."""
    inside = re.match(r"(?:.*?\.)?(\d{1,6})\.(.+)", matrix)
    kind = (inside[2] if inside else matrix).replace(".weight", "")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind), int(inside[1]) if inside else None


def record_at(log: Path, place: int) -> dict[str, Any]:
    """The line that begins at the byte `place`, which was read before."""
    with log.open("rb") as file:
        file.seek(place)
        line = file.readline()
    try:
        record = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        raise _changed(log) from None
    if not isinstance(record, dict):
        raise _changed(log)
    return record


def _changed(log: Path) -> ValueError:
    return ValueError(
        f"report: {log} got other lines while it was read, it takes a log that only grows."
    )


def values_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a step's line, by tag; a run of the demo has them under other names."""
    values = record["values"] if "values" in record else demo_values(record)
    return numbers_of(values)[0]


def numbers_of(values: dict[str, Any]) -> tuple[dict[str, float | None], bool]:
    """What of the values is a number or a gap, and whether all of them are."""
    kinds = {type(value) for value in values.values()}
    if kinds <= {float, NoneType}:
        return values, True  # so are all that Watch writes
    numbers = {
        tag: number(value)
        for tag, value in values.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }
    return numbers, len(numbers) == len(values)


def demo_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo says of a step, and at its end, under the tags of a watched run."""
    if record.get("event") == "end":
        return {"validation_loss": number(record.get("validation_loss"))}
    values: dict[str, Any] = {key: record[key] for key in ("loss", "lr") if key in record}
    alpha, entropy = record.get("alpha"), record.get("entropy")
    matrices = number(record.get("matrices"))
    if isinstance(alpha, dict):
        values |= {f"clip/{name}/lr": value for name, value in alpha.items()}
    if matrices:
        values["clip_share/all matrices"] = (number(record.get("clipped")) or 0.0) / matrices
    for block, heads in enumerate(entropy if isinstance(entropy, list) else []):
        for head, value in enumerate(heads if isinstance(heads, list) else []):
            values[f"block/{block}/head/{head}/entropy"] = value
    return values
