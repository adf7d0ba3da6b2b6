"""docs/compare.md and docs/compare.svg, from the raw results alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from examples.compare.chart import draw
from examples.compare.methods import METHODS, TUNING_SEED, WEIGHT_DECAY
from examples.compare.results import FILE, read
from examples.compare.train import TASKS

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

    @property
    def score(self) -> str:
        return TASKS[self.task].score

    @property
    def title(self) -> str:
        return f"{NAMES[self.task]}, {self.norm}-LN, {self.depth} layers, β₂ {self.beta2:g}"


@dataclass(frozen=True)
class Entry:
    """A method at a rate, over the seeds."""

    scores: tuple[float, ...]  # of the runs that did not diverge
    runs: int
    warmups: tuple[float, ...]

    @property
    def has_diverged(self) -> bool:
        return len(self.scores) < self.runs

    @property
    def mean(self) -> float:
        """Of all runs; not a number where one of them diverged."""
        return math.nan if self.has_diverged else mean(self.scores)

    def text(self, has_tuned_warmup: bool) -> str:
        if self.has_diverged:
            return f"{self.runs - len(self.scores)} of {self.runs} diverged"
        spread = f" ± {stdev(self.scores):.3f}" if self.runs > 1 else ""
        shares = ", ".join(f"{warmup:.0%}" for warmup in self.warmups)
        return f"{mean(self.scores):.3f}{spread}{f' ({shares})' if has_tuned_warmup else ''}"


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

    def best_rate(self, method: str) -> float | None:
        """The rate at which a method ends best; None where it diverges at all of them."""
        sign = 1 if self.cell.score == "loss" else -1
        finite = [lr for lr in self.rates if math.isfinite(self.mean(method, lr))]
        return min(finite, key=lambda lr: sign * self.mean(method, lr), default=None)

    def best(self) -> float:
        """The best mean of any method at any rate."""
        means = [entry.mean for entry in self.entries.values() if not entry.has_diverged]
        return (min if self.cell.score == "loss" else max)(means, default=math.nan)

    def good_rates(self, method: str) -> list[float]:
        """The rates at which a method ends near the best, where anything trains at all."""
        score = self.cell.score
        sign = 1 if score == "loss" else -1
        worst = min(sign * self.best() + NEAR[score], sign * TRAINED[score])
        return [lr for lr in self.rates if sign * self.mean(method, lr) <= worst]


def comparisons(results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """The reported results, sorted by what they compare."""
    grouped: dict[Cell, dict[tuple[str, float], list[dict[str, Any]]]] = {}
    for result in results:
        if result["seed"] != TUNING_SEED:
            cell = Cell(**{field: result[field] for field in Cell._fields})
            runs = grouped.setdefault(cell, {})
            runs.setdefault((result["method"], result["lr"]), []).append(result)
    return [
        Comparison(cell, {key: _entry(cell, runs) for key, runs in by_method.items()})
        for cell, by_method in sorted(grouped.items())
    ]


def _entry(cell: Cell, runs: Sequence[dict[str, Any]]) -> Entry:
    by_seed = sorted(runs, key=lambda run: run["seed"])
    scores = tuple(run[cell.score] for run in by_seed if not run["diverged"])
    return Entry(scores, len(runs), tuple(sorted({run["warmup"] for run in runs})))


def document(results: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown."""
    cells = comparisons(results)
    parts = [
        "# The cures, compared",
        *_introduction(results, cells),
        "## Best over the rates",
        "Mean over the seeds at each method's best rate, which stands behind it.",
        *_summaries(cells, _best_text),
        "## How wide the range of rates is",
        f"Rates at which a method ends within {NEAR['loss']} nats (GPT) or {NEAR['accuracy']} of "
        "accuracy (ViT) of the best that any method reached at any rate, without a seed that "
        f"diverged; and not above {TRAINED['loss']} nats or below {TRAINED['accuracy']} of "
        "accuracy, since there are cells where nothing trains.",
        *_summaries(cells, _range_text),
        "## All numbers",
        "Mean ± standard deviation over the seeds; behind a tuned warmup, its share of steps.",
    ]
    for comparison in cells:
        parts.append(f"### {comparison.cell.title}, {comparison.cell.steps} steps")
        parts.append(_numbers(comparison))
    return "\n\n".join(parts) + "\n"


def _introduction(results: Sequence[dict[str, Any]], cells: Sequence[Comparison]) -> list[str]:
    """What was run, the picture, the methods, and what is still to be run."""
    versions = sorted({(result["version"], result["torch"]) for result in results})
    by_version = " and ".join(f"weyl_megatron {own} on torch {torch}" for own, torch in versions)
    steps = sorted({(comparison.cell.task, comparison.cell.steps) for comparison in cells})
    tuning = sum(result["seed"] == TUNING_SEED for result in results)
    hours = sum(result["seconds"] for result in results) / 3600
    methods = [name for name in METHODS if _is_in(name, cells)]
    parts = [
        f"Written by `python -m examples.compare table` from {len(results)} runs ({tuning} of them "
        f"tuned the warmup; {hours:.1f} hours of one core) by {by_version}; `python -m "
        "examples.compare` makes the runs.",
        "A GPT on the bytes of Python's standard library (validation loss in nats a byte) and a "
        "ViT on scikit-learn's digits (accuracy on a held-out quarter), both of width 64 with 4 "
        f"heads; {', '.join(f'{NAMES[task]} {number} steps' for task, number in steps)}. All "
        "matrices start as Xavier has it, rates follow a cosine to a tenth, β₁ is 0.9, the "
        f"matrices' weight decay {WEIGHT_DECAY}, and gradients are clipped only where the method "
        "says so. Toy scale: read it as a map of where methods fail.",
        "[![The score against the learning rate, for every method](compare.svg)](compare.svg)",
        "\n".join(f"- {METHODS[name].title}: {METHODS[name].note}." for name in methods),
    ]
    partial = [each.cell.title for each in cells if not _is_whole(each, cells)]
    return [*parts, f"Not whole yet: {'; '.join(partial)}."] if partial else parts


def _is_whole(comparison: Comparison, cells: Sequence[Comparison]) -> bool:
    """Whether it has every method's runs at every rate that another cell of its task has."""
    entries = comparison.entries
    of_task = [
        entry
        for other in cells
        if other.cell.task == comparison.cell.task
        for entry in other.entries.items()
    ]
    return all(key in entries and entries[key].runs >= entry.runs for key, entry in of_task)


def _is_in(method: str, cells: Sequence[Comparison]) -> bool:
    return any(method in comparison.methods for comparison in cells)


def _summaries(cells: Sequence[Comparison], text: Callable[[Comparison, str], str]) -> list[str]:
    """A table for each task and β₂: methods down, norms and depths across."""
    parts = []
    for key in sorted({(comparison.cell.task, comparison.cell.beta2) for comparison in cells}):
        task, beta2 = key
        across = [comparison for comparison in cells if comparison.cell[:2] == key]
        has_one_length = len({comparison.cell.steps for comparison in across}) == 1
        columns = [
            f"{cell.norm}-LN, {cell.depth} layers"
            + ("" if has_one_length else f", {cell.steps} steps")
            for cell in (comparison.cell for comparison in across)
        ]
        rows = []
        for name in (method for method in METHODS if _is_in(method, across)):
            texts = (text(each, name) if name in each.methods else "" for each in across)
            rows.append([METHODS[name].title, *texts])
        parts.append(_markdown([f"{NAMES[task]}, β₂ {beta2:g}", *columns], rows))
    return parts


def _best_text(comparison: Comparison, method: str) -> str:
    rate = comparison.best_rate(method)
    if rate is None:
        return "diverged"
    number = comparison.mean(method, rate)
    bold = "**" if number == comparison.best() and len(comparison.methods) > 1 else ""
    return f"{bold}{number:.3f}{bold} at {rate:g}"


def _range_text(comparison: Comparison, method: str) -> str:
    good = comparison.good_rates(method)
    count = f"{len(good)} of {sum(name == method for name, _ in comparison.entries)}"
    return f"{count}: {', '.join(f'{rate:g}' for rate in good)}" if good else count


def _numbers(comparison: Comparison) -> str:
    rows = []
    for name in comparison.methods:
        entries = [comparison.entries.get((name, rate)) for rate in comparison.rates]
        has_tuned_warmup = METHODS[name].warmup is None
        texts = (entry.text(has_tuned_warmup) if entry else "" for entry in entries)
        rows.append([METHODS[name].title, *texts])
    return _markdown([comparison.cell.score, *(f"{rate:g}" for rate in comparison.rates)], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(prog="python -m examples.compare table", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/compare"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    results = list(read(options.out).values())
    cells = comparisons(results)
    if not cells:
        raise ValueError(
            f"compare: --out got {options.out}, it takes a folder whose {FILE} has a finished run."
        )
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / "compare.md").write_text(document(results), encoding="utf-8")
    (options.docs / "compare.svg").write_text(draw(cells), encoding="utf-8")
    print(f"wrote {options.docs / 'compare.md'} and {options.docs / 'compare.svg'}")
    return 0
