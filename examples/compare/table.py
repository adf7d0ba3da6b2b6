"""docs/compare.md and its pictures, from the raw results alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.compare import beside, widths
from examples.compare.cells import (
    MARK,
    NAMES,
    NEAR,
    TRAINED,
    Comparison,
    Entry,
    comparisons,
    markdown,
)
from examples.compare.chart import draw, draw_widths
from examples.compare.methods import METHODS, TUNING_SEED, WEIGHT_DECAY
from examples.compare.noise import RULE
from examples.compare.results import FILE, read


def document(results: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown."""
    everything = comparisons(results)
    cells = of_the_grid(everything)
    parts = [
        "# The cures, compared",
        *_introduction(results, cells),
        "## Best over the rates",
        "Mean ± standard error over the seeds at each method's best rate, which stands behind it. "
        f"Bold is the best of a column, and {MARK} stands before what is within noise of it.",
        RULE,
        *_summaries(cells, _best_text),
        *beside.section(cells),
        "## How wide the range of rates is",
        f"Rates at which a method ends within {NEAR['loss']} nats (GPT) or {NEAR['accuracy']} of "
        "accuracy (ViT) of the best that any method reached at any rate, without a seed that "
        f"diverged; and not above {TRAINED['loss']} nats or below {TRAINED['accuracy']} of "
        "accuracy, since there are cells where nothing trains.",
        *_summaries(cells, _range_text),
        *widths.section(everything),
        "## All numbers",
        "Mean ± standard error over the seeds; bold and "
        f"{MARK} as above, in each table; behind a tuned warmup, its share of steps.",
    ]
    for comparison in everything:
        parts.append(f"### {comparison.cell.title}, {comparison.cell.steps} steps")
        parts.append(_numbers(comparison))
    return "\n\n".join(parts) + "\n"


def of_the_grid(everything: Sequence[Comparison]) -> list[Comparison]:
    """Without the ladder's wider ones."""
    return [comparison for comparison in everything if comparison.cell.is_of_the_grid]


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
        parts.append(markdown([f"{NAMES[task]}, β₂ {beta2:g}", *columns], rows))
    return parts


def _best_text(comparison: Comparison, method: str) -> str:
    return comparison.at_best(method, comparison.mark)


def _range_text(comparison: Comparison, method: str) -> str:
    good = comparison.good_rates(method)
    count = f"{len(good)} of {sum(name == method for name, _ in comparison.entries)}"
    return f"{count}: {', '.join(f'{rate:g}' for rate in good)}" if good else count


def _text(comparison: Comparison, method: str, entry: Entry | None) -> str:
    if entry is None:
        return ""
    has_share = METHODS[method].warmup is None and not entry.has_diverged
    return comparison.mark(entry) + (f" ({entry.shares})" if has_share else "")


def _numbers(comparison: Comparison) -> str:
    rows = []
    for name in comparison.methods:
        entries = [comparison.entries.get((name, rate)) for rate in comparison.rates]
        rows.append([METHODS[name].title, *(_text(comparison, name, each) for each in entries)])
    return markdown([comparison.cell.score, *(f"{rate:g}" for rate in comparison.rates)], rows)


def main(arguments: Sequence[str]) -> int:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m examples.compare table", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/compare"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    results = list(read(options.out).values())
    everything = comparisons(results)
    cells = of_the_grid(everything)
    if not cells:
        raise ValueError(
            f"compare: --out got {options.out}, it takes a folder whose {FILE} has a finished run."
        )
    options.docs.mkdir(parents=True, exist_ok=True)
    pages = {"compare.md": document(results), "compare.svg": draw(cells)}
    if rungs := widths.on_the_ladder(everything):
        pages[widths.PICTURE] = draw_widths(rungs)
    for name, text in pages.items():
        (options.docs / name).write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(str(options.docs / name) for name in pages)}")
    return 0
