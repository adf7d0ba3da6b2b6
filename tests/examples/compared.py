"""Runs and results for the tests of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.compare import results
from examples.compare.train import Run

RUN = Run("vit", 2, "post", "adamw", 3e-3, 0, 0.95, 4, 0.0)


def synthetic(run: Run, loss: float | None) -> dict[str, Any]:
    fields = {field: getattr(run, field) for field in run.__dataclass_fields__}
    accuracy = None if loss is None else max(0.0, 1 - loss / 5)
    ended = {"loss": loss, "accuracy": accuracy, "diverged": loss is None, "seconds": 1.0}
    return {**fields, **ended, "version": "0.1.0", "torch": "2"}


def write(out: Path, made: list[dict[str, Any]]) -> None:
    with results.writing(out) as writer:
        for result in made:
            writer.write(result)
