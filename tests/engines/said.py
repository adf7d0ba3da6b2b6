"""What AdamW2 logs as errors, kept for a worker to tell."""

from __future__ import annotations

import logging


class Said(logging.Handler):
    """Keeps what AdamW2 logs as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken
