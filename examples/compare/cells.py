"""The results by what they compare: cells of the grid, with every method at every rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from examples.compare.methods import METHODS, TUNING_SEED
from examples.compare.noise import difference, standard_error
from examples.compare.results import run_of
from examples.compare.train import TASKS, WIDTH, Run

#: What is within noise of the best has this in front.
MARK = "≈"

#: How far from the best a method may end at a rate that it "trains" at: nats, or the share of right
#: answers.
NEAR = {"loss": 0.1, "accuracy": 0.05}

#: What no method that trains at all is worse than: a GPT that knows only how often each byte
#: occurs ends at 3.19.
TRAINED = {"loss": 3.1, "accuracy": 0.5}

NAMES = {"gpt": "GPT", "vit": "ViT"}


class Cell(NamedTuple):
    """What one table of methods and rates is about."""

    task: str
    beta2: float
    norm: str
    depth: int
    steps: int
    width: int
    batch: int

    @property
    def is_of_the_grid(self) -> bool:
        """Whether it is none of the ladder's wider ones."""
        return self.width == WIDTH and not self.batch

    @property
    def score(self) -> str:
        return TASKS[self.task].score

    @property
    def name(self) -> str:
        return NAMES[self.task]

    @property
    def title(self) -> str:
        width = f"width {self.width}, " if self.width != WIDTH else ""
        return f"{self.name}, {self.norm}-LN, {self.depth} layers, {width}β₂ {self.beta2:g}"


@dataclass(frozen=True)
class Entry:
    """A method at a rate, over the seeds."""

    scores: Mapping[int, float]  # of the runs that did not diverge, by seed
    runs: int
    warmups: tuple[float, ...]

    @property
    def has_diverged(self) -> bool:
        return len(self.scores) < self.runs

    @property
    def mean(self) -> float:
        """Of all runs; not a number where one of them diverged."""
        return math.nan if self.has_diverged else fmean(self.scores.values())

    @property
    def shares(self) -> str:
        """The warmups' shares of the steps."""
        return ", ".join(f"{warmup:.0%}" for warmup in self.warmups)

    @property
    def text(self) -> str:
        """The mean and its standard error."""
        if self.has_diverged:
            return f"{self.runs - len(self.scores)} of {self.runs} diverged"
        spread = f" ± {standard_error([*self.scores.values()]):.3f}" if self.runs > 1 else ""
        return f"{self.mean:.3f}{spread}"


@dataclass(frozen=True)
class Comparison:
    """The entries of one cell, by method and rate."""

    cell: Cell
    entries: dict[tuple[str, float], Entry]

    @property
    def methods(self) -> list[str]:
        present = {method for method, _ in self.entries}
        return [method for method in METHODS if method in present]

    @property
    def rates(self) -> list[float]:
        return sorted({lr for _, lr in self.entries})

    def mean(self, method: str, lr: float) -> float:
        entry = self.entries.get((method, lr))
        return entry.mean if entry is not None else math.nan

    @property
    def sign(self) -> int:
        """Times this, the smaller score is the better."""
        return 1 if self.cell.score == "loss" else -1

    def best_rate(self, method: str) -> float | None:
        """The rate at which a method ends best; None where it diverges at all of them."""
        finite = [lr for lr in self.rates if math.isfinite(self.mean(method, lr))]
        return min(finite, key=lambda lr: self.sign * self.mean(method, lr), default=None)

    def best_entry(self, method: str) -> Entry | None:
        """What a method ends with at its best rate."""
        rate = self.best_rate(method)
        return None if rate is None else self.entries[method, rate]

    def at_best(self, method: str, tell: Callable[[Entry], str]) -> str:
        """What ``tell`` says of a method at its best rate, and the rate; nothing where it was not
        run.
        """
        if method not in self.methods:
            return ""
        rate = self.best_rate(method)
        return "diverged" if rate is None else f"{tell(self.entries[method, rate])} at {rate:g}"

    def best(self) -> float:
        """The best mean of any method at any rate."""
        means = [entry.mean for entry in self.entries.values() if not entry.has_diverged]
        return (min if self.cell.score == "loss" else max)(means, default=math.nan)

    def mark(self, entry: Entry) -> str:
        """Its text: bold where it is the best, with a mark where it is within noise of the best."""
        if entry.has_diverged or len(self.methods) < 2:
            return entry.text
        (winner, *_) = (each for each in self.entries.values() if each.mean == self.best())
        if entry.mean == winner.mean:
            return f"**{entry.text}**"
        is_noise = difference(entry.scores, winner.scores).is_noise
        return f"{MARK} {entry.text}" if is_noise else entry.text

    def good_rates(self, method: str) -> list[float]:
        """The rates at which a method ends near the best, where anything trains at all."""
        score, sign = self.cell.score, self.sign
        worst = min(sign * self.best() + NEAR[score], sign * TRAINED[score])
        return [lr for lr in self.rates if sign * self.mean(method, lr) <= worst]


def cell_of(run: Run) -> Cell:
    return Cell(**{field: getattr(run, field) for field in Cell._fields})


def comparisons(results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """The reported results, sorted by what they compare."""
    grouped: dict[Cell, dict[tuple[str, float], list[dict[str, Any]]]] = {}
    for result in results:
        if result["seed"] != TUNING_SEED:
            cell = cell_of(run_of(result))
            runs = grouped.setdefault(cell, {})
            runs.setdefault((result["method"], result["lr"]), []).append(result)
    return [
        Comparison(cell, {key: _entry(cell, runs) for key, runs in by_method.items()})
        for cell, by_method in sorted(grouped.items())
    ]


def _entry(cell: Cell, runs: Sequence[dict[str, Any]]) -> Entry:
    by_seed = sorted(runs, key=lambda run: run["seed"])
    scores = {run["seed"]: run[cell.score] for run in by_seed if not run["diverged"]}
    return Entry(scores, len(runs), tuple(sorted({run["warmup"] for run in runs})))


def bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
