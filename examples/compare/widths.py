"""What the page says, and its picture shows, of the methods as the GPT grows wider."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise

from examples.compare.beside import within_noise
from examples.compare.cells import MARK, Comparison, bullets, markdown
from examples.compare.ladder import BETA2, CONTENDERS, DEPTH, RATES, RUNGS, TASK, Rung
from examples.compare.methods import METHODS
from examples.compare.noise import difference
from examples.compare.train import CONTEXT, TASKS

#: The picture's name in docs/; the page shows it.
PICTURE = "compare-widths.svg"


def on_the_ladder(cells: Sequence[Comparison]) -> list[Comparison]:
    """The ladder's rungs, pre-norm first, the narrow ones first, of the methods that are whole.

    None if that leaves but one width.
    """
    rungs = []
    for each in cells:
        cell, rung = each.cell, RUNGS.get(each.cell.width)
        if (cell.task, cell.depth, cell.beta2) != (TASK, DEPTH, BETA2) or rung is None:
            continue
        if cell.norm not in rung.norms or (cell.steps, cell.batch) != (rung.steps, rung.batch):
            continue
        if whole := _whole_methods(each, rung):
            kept = {key: entry for key, entry in each.entries.items() if key[0] in whole}
            rungs.append(Comparison(cell, kept))
    rungs.sort(key=lambda each: (each.cell.norm != "pre", each.cell.width))
    return rungs if len({each.cell.width for each in rungs}) > 1 else []


def _whole_methods(comparison: Comparison, rung: Rung) -> list[str]:
    """The contenders that have all seeds at all rates."""
    runs = Counter[str]()
    for (method, _), entry in comparison.entries.items():
        runs[method] += entry.runs
    wanted = len(rung.seeds) * (1 if rung.chosen_at else len(RATES))
    return [name for name in CONTENDERS if runs[name] >= wanted]


def section(cells: Sequence[Comparison]) -> list[str]:
    """The section, or nothing where no second width was run."""
    rungs = on_the_ladder(cells)
    if not rungs:
        return []
    columns = [f"{each.cell.norm}-LN, width {each.cell.width}" for each in rungs]
    rows = [[METHODS[name].title, *(_text(each, name) for each in rungs)] for name in CONTENDERS]
    orders = [_order(each) for each in rungs]
    missing = _missing(rungs)
    return [
        "## As the width grows",
        f"A GPT of {DEPTH} layers with 4 heads, β₂ {BETA2:g} (`python -m examples.compare "
        f"ladder`). {' '.join(_what_was_run())} Best over the rates, mean ± standard "
        f"error; bold and {MARK} as above, among these methods.",
        markdown(["loss", *columns], rows),
        f"[![How far above Muon each method ends, by width]({PICTURE})]({PICTURE})",
        f"Best first; {MARK} between two that are within noise of each other:",
        bullets(orders),
        "Less Muon:",
        bullets(_gaps(rungs)),
        *(["Not whole yet, and not shown:", bullets(missing)] if missing else []),
    ]


def _what_was_run() -> list[str]:
    """A sentence a width."""
    sentences = []
    for width, rung in RUNGS.items():
        tokens = (rung.batch or TASKS[TASK].batch) * CONTEXT
        norms = " and ".join(f"{norm}-LN" for norm in rung.norms)
        rates = (
            f"at the rate and with the warmup that were best at {rung.chosen_at}"
            if rung.chosen_at
            else f"at {len(RATES)} rates"
        )
        sentences.append(
            f"Width {width}: {norms}, {rung.steps:,} steps of {tokens:,} tokens, "
            f"{len(rung.seeds)} seeds, {rates}."
        )
    return sentences


def _text(comparison: Comparison, method: str) -> str:
    entry = comparison.best_entry(method) if METHODS[method].warmup is None else None
    share = f" ({entry.shares})" if entry is not None else ""
    return comparison.at_best(method, comparison.mark) + share


def _order(comparison: Comparison) -> str:
    """The methods of a rung from the best on."""
    bests = {name: comparison.best_entry(name) for name in CONTENDERS}
    means = {name: entry.mean for name, entry in bests.items() if entry is not None}
    names = sorted(means, key=lambda name: comparison.sign * means[name])
    text = METHODS[names[0]].title if names else "all diverged"
    for before, name in pairwise(names):
        text += f" {MARK if within_noise(comparison, before, name) else '<'} {METHODS[name].title}"
    return f"{comparison.cell.norm}-LN, width {comparison.cell.width}: {text}"


def _gaps(rungs: Sequence[Comparison]) -> list[str]:
    """How far from Muon each method ends, by width."""
    gaps = []
    for norm, group in groupby(rungs, key=lambda each: each.cell.norm):
        alike = list(group)
        for name in CONTENDERS[:-1]:
            texts = [
                f"{difference(entry.scores, muon.scores).text} at width {each.cell.width}"
                for each in alike
                if (entry := each.best_entry(name)) and (muon := each.best_entry("muon"))
            ]
            if texts:
                gaps.append(f"{norm}-LN, {METHODS[name].title}: {'; '.join(texts)}")
    return gaps


def _missing(rungs: Sequence[Comparison]) -> list[str]:
    """What of the ladder is not there, or not with all seeds and rates."""
    there = {(each.cell.width, each.cell.norm): each.methods for each in rungs}
    missing = []
    for width, rung in RUNGS.items():
        for norm in rung.norms:
            present = there.get((width, norm), [])
            names = [METHODS[name].title for name in CONTENDERS if name not in present]
            if names:
                missing.append(f"{norm}-LN, width {width}: {'; '.join(names)}")
    return missing
