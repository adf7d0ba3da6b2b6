"""Read what watched runs logged, and say of every line that cannot be read why not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

LOG, DEMO_LOG = "stability.jsonl", "log.jsonl"
VERSION = 1

_LARGEST_MAP = 64  # rows and columns that are kept of a map; larger ones are pooled
_LARGEST = 1e300
_LISTED = 5  # line numbers that a note names

Points = list[tuple[int, float | None]]


@dataclass(frozen=True)
class AttentionMap:
    """One head's attention at one step: a byte for each pair, row by row, 255·√p."""

    step: int
    block: int
    head: int
    rows: int
    cols: int
    levels: bytes


@dataclass(frozen=True)
class Warned:
    """An early warning as it was given."""

    step: int
    block: int
    head: int
    text: str


@dataclass(frozen=True)
class Run:
    """One run's log.

    A value that was not a finite number is None; `notes` say what could not be read.
    """

    name: str
    title: str
    header: Mapping[str, Any]
    series: Mapping[str, Points]
    maps: Sequence[AttentionMap]
    warnings: Sequence[Warned]
    notes: Sequence[str]

    @property
    def is_readable(self) -> bool:
        """Whether anything of the run can be shown."""
        return bool(self.series or self.maps or self.warnings)

    def last(self, tag: str) -> float | None:
        """The last value under `tag`; None where it was no finite number or there is none."""
        points = self.series.get(tag)
        return points[-1][1] if points else None

    def heads(self, name: str) -> dict[tuple[int, int], Points]:
        """The series `name` of every head, by (block, head)."""
        tagged = self._tagged(rf"block/(\d{{1,6}})/head/(\d{{1,6}})/{re.escape(name)}")
        return dict(sorted(((int(match[1]), int(match[2])), points) for match, points in tagged))

    def blocks(self, name: str) -> dict[int, Points]:
        """The series `name` of every block."""
        tagged = self._tagged(rf"block/(\d{{1,6}})/{re.escape(name)}")
        return dict(sorted((int(match[1]), points) for match, points in tagged))

    def matrices(self, name: str) -> dict[str, Points]:
        """What the optimizer said of every matrix, by its name."""
        return {match[1]: points for match, points in self._tagged(rf"clip/(.+)/{re.escape(name)}")}

    def shares(self) -> dict[str, Points]:
        """The share of clipped matrices, by their kind."""
        return {match[1]: points for match, points in self._tagged(r"clip_share/(.+)")}

    def block_shares(self) -> dict[int, Points]:
        """The share of clipped matrices, by block."""
        tagged = self._tagged(r"clip_share_block/(\d{1,6})")
        return dict(sorted((int(match[1]), points) for match, points in tagged))

    @property
    def uniform_entropy(self) -> float | None:
        """The entropy of attention that looks at all keys alike."""
        value = _number(self.header.get("uniform_entropy"))
        return self.last("uniform_entropy") if value is None else value

    def _tagged(self, pattern: str) -> Iterator[tuple[re.Match[str], Points]]:
        for tag, points in self.series.items():
            match = re.fullmatch(pattern, tag)
            if match:
                yield match, points


def expand(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders; one without a log stands for those of its folders that have one."""
    expanded: list[Path] = []
    for folder in folders:
        inside = []
        if folder.is_dir() and not _has_log(folder):
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and _has_log(path))
        expanded += inside or [folder]
    return list(dict.fromkeys(expanded))


def read_run(folder: Path) -> Run:
    """Read the log of `folder`, as far as it can be read."""
    reading = _Reading(folder.resolve().name)
    if (folder / LOG).is_file():
        _read_lines(folder / LOG, reading.take, reading)
    elif (folder / DEMO_LOG).is_file():
        _read_lines(folder / DEMO_LOG, reading.take_demo, reading)
        reading.header.update(_demo_setting(folder.parent / "setting.json"))
    else:
        reading.notes.append(f"{folder} has no {LOG} or {DEMO_LOG}.")
    return reading.run(folder)


def _has_log(folder: Path) -> bool:
    return (folder / LOG).is_file() or (folder / DEMO_LOG).is_file()


def _read_lines(path: Path, take: Any, reading: _Reading) -> None:
    """Give every line that is a JSON object to `take`, which says what is wrong with it, or ""."""
    wrong: dict[str, list[int]] = {}
    line, number, text = "\n", 0, ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                fault = "not JSON" if line.endswith("\n") else "cut off"
            else:
                fault = take(record) if isinstance(record, dict) else "not an object"
            if fault:
                wrong.setdefault(fault, []).append(number)
    for fault, lines in wrong.items():
        shown = ", ".join(map(str, lines[:_LISTED])) + (", …" if len(lines) > _LISTED else "")
        what = f"line {shown} is" if len(lines) == 1 else f"{len(lines)} lines ({shown}) are"
        reading.notes.append(f"{path}: {what} {fault}.")
    if not number:
        reading.notes.append(f"{path} is empty.")


@dataclass
class _Reading:
    """A log on its way to a Run."""

    name: str
    header: dict[str, Any] = field(default_factory=dict)
    series: dict[str, dict[int, float | None]] = field(default_factory=dict)
    maps: dict[tuple[int, int, int], AttentionMap] = field(default_factory=dict)
    warnings: list[Warned] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    newest: int = -1
    is_restarted: bool = False

    def take(self, record: Mapping[str, Any]) -> str:
        """Take one line of a watched run."""
        event = record.get("event")
        if event == "start":
            self._start(record)
            return ""
        if event not in ("step", "map", "warning"):
            return f"of the unknown event {event!r}"
        step = _whole(record.get("step"))
        if step is None:
            return f"a {event} without a number of its step"
        if event == "step":
            return self._step(step, record.get("values"))
        place = _whole(record.get("block")), _whole(record.get("head"))
        if place[0] is None or place[1] is None:
            return f"a {event} without its block and head"
        if event == "map":
            return self._map(step, place[0], place[1], record)
        self._at(step)
        self.warnings.append(Warned(step, place[0], place[1], str(record.get("text", ""))))
        return ""

    def take_demo(self, record: Mapping[str, Any]) -> str:
        """Take one line of a run of the demo, under the tags of a watched one."""
        event = record.get("event")
        if event == "start":
            title = record.get("title", record.get("run"))
            self._start({"version": VERSION, **record, "run": title})
            return ""
        if event == "end":
            loss = _number(record.get("validation_loss"))
            self.series["validation_loss"] = {max(self.newest, 0): loss}
            return ""
        if event != "step":
            return f"of the unknown event {event!r}"
        step = _whole(record.get("step"))
        if step is None:
            return "a step without its number"
        values: dict[str, Any] = {key: record[key] for key in ("loss", "lr") if key in record}
        alpha, entropy = record.get("alpha"), record.get("entropy")
        matrices = _number(record.get("matrices"))
        if isinstance(alpha, dict):
            values |= {f"clip/{name}/lr": value for name, value in alpha.items()}
        if matrices:
            values["clip_share/all matrices"] = (_number(record.get("clipped")) or 0.0) / matrices
        for block, heads in enumerate(entropy if isinstance(entropy, list) else []):
            for head, value in enumerate(heads if isinstance(heads, list) else []):
                values[f"block/{block}/head/{head}/entropy"] = value
        return self._step(step, values)

    def run(self, folder: Path) -> Run:
        """What was read, in the order of the steps."""
        if not (self.series or self.maps or self.warnings) and not self.notes:
            self.notes.append(f"{folder} has no measurement yet.")
        return Run(
            name=self.name,
            title=str(self.header.get("run") or self.name),
            header=self.header,
            series={tag: sorted(points.items()) for tag, points in self.series.items()},
            maps=[self.maps[key] for key in sorted(self.maps)],
            warnings=sorted(self.warnings, key=lambda warned: warned.step),
            notes=self.notes,
        )

    def _start(self, record: Mapping[str, Any]) -> None:
        if record.get("version") != VERSION:
            got = record.get("version")
            self.notes.append(
                f"{self.name} is of version {got!r}, this reads {VERSION}; what it knows of it is "
                "shown."
            )
        self.header = {key: value for key, value in record.items() if key != "event"}
        self.is_restarted = self.newest >= 0

    def _at(self, step: int) -> None:
        """Drop what a run that is started again from an earlier step says once more."""
        if self.is_restarted and step <= self.newest:
            self.notes.append(
                f"{self.name} was started again at step {step}; what it logged from there on "
                "before is left out."
            )
            for tag, points in list(self.series.items()):
                self.series[tag] = {at: value for at, value in points.items() if at < step}
            self.series = {tag: points for tag, points in self.series.items() if points}
            self.maps = {key: kept for key, kept in self.maps.items() if kept.step < step}
            self.warnings = [warned for warned in self.warnings if warned.step < step]
            self.newest = step
        self.is_restarted = False
        self.newest = max(self.newest, step)

    def _step(self, step: int, values: Any) -> str:
        if not isinstance(values, dict):
            return "a step without values"
        self._at(step)
        for tag, value in values.items():
            if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                self.series.setdefault(tag, {})[step] = _number(value)
        unfit = sum(isinstance(value, (bool, str, list, dict)) for value in values.values())
        return "a step with values that are not numbers" if unfit else ""

    def _map(self, step: int, block: int, head: int, record: Mapping[str, Any]) -> str:
        rows, cols = _whole(record.get("rows")), _whole(record.get("cols"))
        text = record.get("levels")
        try:
            levels = bytes.fromhex(text if isinstance(text, str) else "?")
        except ValueError:
            return "a map whose levels are not hexadecimal"
        if not rows or not cols or len(levels) != rows * cols:
            return "a map whose levels are not rows × cols"
        self._at(step)
        whole = AttentionMap(step, block, head, rows, cols, levels)
        self.maps[step, block, head] = pooled(whole, _LARGEST_MAP)
        return ""


def pooled(kept: AttentionMap, largest: int) -> AttentionMap:
    """The map with at most `largest` rows and columns, each the maximum of those it stands for."""
    rows, cols = min(kept.rows, largest), min(kept.cols, largest)
    if (rows, cols) == (kept.rows, kept.cols):
        return kept
    levels = torch.frombuffer(bytearray(kept.levels), dtype=torch.uint8)
    whole = levels.view(1, kept.rows, kept.cols).float()
    small = torch.nn.functional.adaptive_max_pool2d(whole, (rows, cols)).to(torch.uint8)
    return replace(kept, rows=rows, cols=cols, levels=bytes(small.flatten().tolist()))


def thin(points: Points, most: int) -> Points:
    """At most `most` of the points, the first and the last among them.

    Of each stretch of the others: the lowest, the highest and a gap.
    """
    if len(points) <= most:
        return points
    inner = points[1:-1]
    length = math.ceil(len(inner) / ((most - 2) // 3))
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


def matrix_place(matrix: str) -> tuple[str, int | None]:
    """A matrix's kind and its block's number; the experts of a block are of one kind."""
    inside = re.match(r"(?:.*?\.)?(\d{1,6})\.(.+)", matrix)
    kind = (inside[2] if inside else matrix).replace(".weight", "")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind), int(inside[1]) if inside else None


def _demo_setting(path: Path) -> dict[str, Any]:
    """What the demo says of all of its runs beside their folders."""
    try:
        setting = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    has_it = isinstance(setting, dict) and "uniform_entropy" in setting
    return {"uniform_entropy": setting["uniform_entropy"]} if has_it else {}


def _number(value: Any) -> float | None:
    """A finite number as a float; None for all else, and where a chart's range would overflow."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def _whole(value: Any) -> int | None:
    """A whole number from 0 on; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < 2**53 else None
