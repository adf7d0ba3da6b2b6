"""The raw results: OUT/results.jsonl, one run a line, appended to by one process."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, BinaryIO

from examples.compare.train import Run

FILE = "results.jsonl"


def run_of(result: Mapping[str, Any]) -> Run:
    """The run whose result it is; a line that has not all fields is of a run by default."""
    needed = {field.name: result[field.name] for field in fields(Run) if field.default is MISSING}
    others = {field.name: result.get(field.name, field.default) for field in fields(Run)}
    return Run(**{**others, **needed})


def read(out: Path) -> dict[Run, dict[str, Any]]:
    """All results by run. A last line without its end was cut off by a kill and does not count.

    Raises:
        ValueError: a whole line that is not a result.
    """
    path = out / FILE
    if not path.exists():
        return {}
    results = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            result = json.loads(line)
            results[run_of(result)] = result
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"compare: line {number} of {path} got {line[:60]!r}, it takes one run's JSON; "
                "delete it and go on."
            ) from None
    return results


class Writer:
    """Appends results to a file; whole lines, each on the disk before the next."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, result: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def writing(out: Path) -> Iterator[Writer]:
    """Open the results to append to, cutting off half a last line.

    Raises:
        ValueError: another process writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"compare: --out got {out}, where another process writes; it takes one at a time."
            ) from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield Writer(file)
