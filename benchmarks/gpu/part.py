"""What a part is given, and what it says: results as lines that the run reads from its output."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]

#: What a line begins with that the run reads.
RESULT, NOT_RUN = "RESULT ", "NOT RUN "

#: The exit status of a part after whose failure the others tell nothing.
STOP = 3


class NotRun(Exception):
    """A part cannot run here; the sentence says why."""


class Failed(Exception):
    """A part ran, and what it found is not as it should be."""


class Stop(Exception):
    """It is so wrong that no other part tells anything."""


@dataclass(frozen=True)
class Task:
    """How a part is to run."""

    device: str  # "cuda" or "cpu"
    tiny: bool
    until: float  # the time, as time.time() has it, at which its process is ended
    out: Path  # the folder of its files
    train_seconds: float  # for each run of `train`, at most

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.until - time.time()

    def options(self) -> list[str]:
        """Return the options of a process that goes on with this task."""
        options = ["--device", self.device, "--until", str(self.until)]
        return [*options, "--train-seconds", str(self.train_seconds), *["--tiny"] * self.tiny]

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int = 10) -> float:
        """Return the median seconds of ``work``, the device waited for, after two that warm up."""
        taken = []
        for _ in range(times + 2):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[2:])

    def forget_peak(self) -> None:
        """Have :meth:`peak` speak of what comes now."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """Return the most GiB that tensors took; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.is_gpu else None


def result(name: str, **values: Any) -> None:
    """Have the run save a result, at once."""
    print(RESULT + json.dumps(_plain({"name": name, **values})), flush=True)


def not_run(reason: str) -> None:
    """Have the run note that a part does not run here."""
    print(NOT_RUN + reason, flush=True)


def _plain(value: Any) -> Any:
    """Return what JSON takes; it has neither NaN nor infinity, which a run may end in."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def difference(tensor: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected number; infinity where one is NaN."""
    tensor, expected = tensor.detach().double().cpu(), expected.detach().double().cpu()
    if not tensor.numel():
        return 0.0
    share = float((tensor - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(share) else share


def short(number: float) -> str:
    """Return a small number in the digits that count."""
    return f"{number:.1e}"
