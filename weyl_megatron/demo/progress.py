"""The live lines: which run, how far, its loss, the clipped matrices, and the time left.

No library of progress bars: where the output is no terminal these write a line a refresh (tqdm) or
nothing before the end (rich), and neither knows the time of the runs to come.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, TextIO

from .recipe import RUNS, Run

BAR = 20
LINE_EVERY = 50  # steps, where the output is no terminal


class Progress:
    """Follows the runs' logs while the worker writes them, and draws on `stream`."""

    def __init__(self, out: Path, steps: int, stream: TextIO) -> None:
        self.logs = {run.name: _Tail(out / run.name / "log.jsonl") for run in RUNS}
        self.steps = steps
        self.stream = stream
        self.live = stream.isatty()
        self.began = time.monotonic()
        self.finished: list[float] = []  # seconds of each finished run
        self.width = max(len(run.title) for run in RUNS)

    def update(self) -> None:
        """Draws what has been logged since the last call."""
        for run in RUNS:
            self._drain(run)
        if self.live and not self._started():
            self._draw(f"starting the processes … {time.monotonic() - self.began:.0f} s")

    def close(self) -> None:
        """Leaves the cursor on a line of its own."""
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _started(self) -> bool:
        return any(log.position for log in self.logs.values())

    def _drain(self, run: Run) -> None:
        records = self.logs[run.name].read()
        for record in records:
            if record["event"] == "end":
                self.finished.append(record["elapsed"])
                loss, seconds = record["validation_loss"], record["elapsed"]
                final = f"validation loss {loss:.3f}  in {seconds:.0f} s"
                self._line(f"{run.title:<{self.width}}  {final}")
            elif record["event"] == "step" and not self.live and record["step"] % LINE_EVERY == 0:
                self._line(self._describe(run, record))
        if self.live and records and records[-1]["event"] == "step":
            self._draw(self._describe(run, records[-1]))

    def _describe(self, run: Run, record: dict[str, Any]) -> str:
        step = record["step"]
        done = BAR * step // self.steps
        bar = f"{'━' * done}{'·' * (BAR - done)}  " if self.live else ""
        clipped = ""
        if "clipped" in record:
            clipped = f"clipped {record['clipped']:>2}/{record['matrices']} matrices  "
        left = self._seconds_left(record)
        return (
            f"{run.title:<{self.width}}  {bar}step {step:>{len(str(self.steps))}}/{self.steps}  "
            f"loss {record['loss']:.3f}  {clipped}{left // 60}:{left % 60:02} left"
        )

    def _seconds_left(self, record: dict[str, Any]) -> int:
        """The rest of this run at its own pace, and of the runs to come at the mean pace so far."""
        elapsed: float = record["elapsed"]
        step: int = record["step"]
        this = elapsed / step * self.steps
        later = len(RUNS) - len(self.finished) - 1
        mean = (sum(self.finished) + this) / (len(self.finished) + 1)
        return round(this - elapsed + later * mean)

    def _draw(self, text: str) -> None:
        """Writes over the live line."""
        columns = shutil.get_terminal_size().columns
        self.stream.write(f"\r\x1b[K{text[: columns - 1]}")
        self.stream.flush()

    def _line(self, text: str) -> None:
        """Writes a line that stays."""
        self.close()
        self.stream.write(text + "\n")
        self.stream.flush()


class _Tail:
    """Reads the complete lines that have been added to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self.position += len(complete)
        return [json.loads(line) for line in complete.splitlines()]
