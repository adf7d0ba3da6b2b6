"""Read what watched runs logged, and say of every line that cannot be read why not.

A log is read line by line, and never held: numbers go to a `series.Builder`, of an attention map
its place in the file is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .events import (
    MapPlace,
    Spike,
    Warned,
    read_map,
    read_spike,
    whole,
)
from .run import Run, demo_values, numbers_of, record_at, values_of
from .series import Builder

LOG, DEMO_LOG = "stability.jsonl", "log.jsonl"
VERSION = 1

_LISTED = 5  # line numbers that a note names
_EVENTS = ("step", "map", "warning", "spike")


def expand(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders; one without a log stands for those of its folders that have one."""
    expanded: list[Path] = []
    for folder in folders:
        inside = []
        if folder.is_dir() and not _has_log(folder):
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and _has_log(path))
        expanded += inside or [folder]
    return list(dict.fromkeys(expanded))


def read_run(folder: Path, until: int | None = None) -> Run:
    """Read the log of `folder`, as far as it can be read; of a watched run up to step `until`."""
    is_demo = not (folder / LOG).is_file()
    reading = _Reading(folder.resolve().name, folder / (DEMO_LOG if is_demo else LOG), until)
    if not is_demo:
        reading.read(reading.take)
    elif reading.log.is_file():
        reading.read(reading.take_demo)
        reading.header.update(_demo_setting(folder.parent / "setting.json"))
    else:
        reading.notes.append(f"{folder} has no {LOG} or {DEMO_LOG}.")
    return reading.run(folder)


def _has_log(folder: Path) -> bool:
    return (folder / LOG).is_file() or (folder / DEMO_LOG).is_file()


class _Reading:
    """A log on its way to a Run."""

    def __init__(self, name: str, log: Path, until: int | None) -> None:
        self.name = name
        self.log = log
        self._until = until
        self.header: dict[str, Any] = {}
        self.notes: list[str] = []
        self._builder = Builder(lambda place: values_of(record_at(log, place)))
        self._maps: dict[tuple[int, int, int], MapPlace] = {}
        self._warnings: list[Warned] = []
        self._spikes: list[Spike] = []
        self._newest = -1
        self._is_restarted = False
        self._place = 0  # of the line that is read

    def read(self, take: Callable[[Mapping[str, Any]], str]) -> None:
        """Give every line that is an object to `take`, which says what is wrong with it, or ""."""
        wrong: dict[str, list[int]] = {}
        at = count = 0
        with self.log.open("rb") as file:
            for count, line in enumerate(file, 1):
                self._place, at = at, at + len(line)
                fault = self._fault(line, take) if line.strip() else ""
                if fault:
                    wrong.setdefault(fault, []).append(count)
        for fault, lines in wrong.items():
            shown = ", ".join(map(str, lines[:_LISTED])) + (", …" if len(lines) > _LISTED else "")
            what = f"line {shown} is" if len(lines) == 1 else f"{len(lines)} lines ({shown}) are"
            self.notes.append(f"{self.log}: {what} {fault}.")
        if not count:
            self.notes.append(f"{self.log} is empty.")

    def _fault(self, line: bytes, take: Callable[[Mapping[str, Any]], str]) -> str:
        try:
            record = json.loads(line.decode(errors="replace").strip())
        except (ValueError, RecursionError):
            return "not JSON" if line.endswith(b"\n") else "cut off"
        return take(record) if isinstance(record, dict) else "not an object"

    def take(self, record: Mapping[str, Any]) -> str:
        """Take one line of a watched run."""
        event = record.get("event")
        if event == "start":
            self._start(record)
            return ""
        if event not in _EVENTS:
            return f"of the unknown event {event!r}"
        step = whole(record.get("step"))
        if step is None:
            return f"a {event} without a number of its step"
        if self._until is not None and step > self._until:
            return ""
        if event == "step":
            return self._step(step, record)
        if event == "spike":
            return self._spike(step, record)
        block, head = whole(record.get("block")), whole(record.get("head"))
        if block is None or head is None:
            return f"a {event} without its block and head"
        if event == "map":
            return self._map(step, block, head, record)
        self._at(step)
        self._warnings.append(Warned(step, block, head, str(record.get("text", ""))))
        return ""

    def take_demo(self, record: Mapping[str, Any]) -> str:
        """Take one line of a run of the demo."""
        event = record.get("event")
        if event == "start":
            title = record.get("title", record.get("run"))
            self._start({"version": VERSION, **record, "run": title})
            return ""
        if event == "end":
            self._builder.add(max(self._newest, 0), values_of(record), self._place)
            return ""
        if event != "step":
            return f"of the unknown event {event!r}"
        step = whole(record.get("step"))
        if step is None:
            return "a step without its number"
        return self._step(step, {"event": event, "values": demo_values(record)})

    def run(self, folder: Path) -> Run:
        """What was read, in the order of the steps."""
        table = self._builder.table()
        has_any = table.rows or self._maps or self._warnings or self._spikes
        if not has_any and not self.notes:
            self.notes.append(f"{folder} has no measurement yet.")
        return Run(
            name=self.name,
            title=str(self.header.get("run") or self.name),
            header=self.header,
            table=table,
            maps=[self._maps[key] for key in sorted(self._maps)],
            warnings=sorted(self._warnings, key=lambda warned: warned.step),
            spikes=sorted(self._spikes, key=lambda spike: spike.step),
            notes=self.notes,
            log=self.log,
            places=dict(zip(self._builder.steps, self._builder.places, strict=True)),
        )

    def _start(self, record: Mapping[str, Any]) -> None:
        if record.get("version") != VERSION:
            got = record.get("version")
            self.notes.append(
                f"{self.name} is of version {got!r}, this reads {VERSION}; what it knows of it is "
                "shown."
            )
        self.header = {key: value for key, value in record.items() if key != "event"}
        self._is_restarted = self._newest >= 0

    def _at(self, step: int) -> None:
        """Drop what a run that is started again from an earlier step says once more."""
        if self._is_restarted and step <= self._newest:
            self.notes.append(
                f"{self.name} was started again at step {step}; what it logged from there on "
                "before is left out."
            )
            self._builder.drop(step)
            self._maps = {key: kept for key, kept in self._maps.items() if kept.step < step}
            self._warnings = [warned for warned in self._warnings if warned.step < step]
            self._spikes = [spike for spike in self._spikes if spike.step < step]
            self._newest = step
        self._is_restarted = False
        self._newest = max(self._newest, step)

    def _step(self, step: int, record: Mapping[str, Any]) -> str:
        values = record.get("values")
        if not isinstance(values, dict):
            return "a step without values"
        self._at(step)
        if self._builder.steps and step < self._builder.steps[-1]:
            return "a step that is before the last one"
        numbers, are_all = numbers_of(values)
        self._builder.add(step, numbers, self._place)
        return "" if are_all else "a step with values that are not numbers"

    def _map(self, step: int, block: int, head: int, record: Mapping[str, Any]) -> str:
        read = read_map(record)
        if isinstance(read, str):
            return read
        self._at(step)
        rows, cols, _ = read
        self._maps[step, block, head] = MapPlace(step, block, head, rows, cols, self._place)
        return ""

    def _spike(self, step: int, record: Mapping[str, Any]) -> str:
        read = read_spike(step, record)
        if isinstance(read, str):
            return read
        self._at(step)
        self._spikes.append(read)
        return ""


def _demo_setting(path: Path) -> dict[str, Any]:
    """What the demo says of all of its runs beside their folders."""
    try:
        setting = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    has_it = isinstance(setting, dict) and "uniform_entropy" in setting
    return {"uniform_entropy": setting["uniform_entropy"]} if has_it else {}
