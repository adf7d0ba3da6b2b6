"""What the page says of projected AdamW², beside its rivals, whichever way it came out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from examples.compare.cells import Comparison, bullets, markdown
from examples.compare.methods import METHODS
from examples.compare.noise import difference

PROJECTED, SCALED, MUON = "adamw2-project", "adamw2-auto", "muon"

#: Who is compared with whom, each at the rate that is best for it.
PAIRS = (
    (PROJECTED, MUON),
    (PROJECTED, SCALED),
    (PROJECTED, "warmup"),
    ("adamw2-project-0.01", "adamw2"),
)

#: What was asked for before the runs: how far projected AdamW² may end above Muon, in nats, on the
#: GPT of this depth at this β₂, with at least as many of the rates that train.
ASKED, ASKED_DEPTH, ASKED_BETA2 = 0.02, 6, 0.95


def section(cells: Sequence[Comparison]) -> list[str]:
    """The section, or nothing where no cell has both methods of a pair."""
    sentences = [sentence for pair in PAIRS if (sentence := _sentence(cells, *pair))]
    if not sentences:
        return []
    return [
        "## Projected AdamW² beside the others",
        "Each at its best rate; noise as above.",
        bullets([*sentences, *_asked(cells), *_edges(cells)]),
        *_table(cells),
    ]


def _are_both_in(comparison: Comparison, method: str, rival: str) -> bool:
    """Whether both were run, at the same rates with as many seeds."""
    first, second = (
        {lr: entry.runs for (name, lr), entry in comparison.entries.items() if name == each}
        for each in (method, rival)
    )
    return first == second != {}


def gain(comparison: Comparison, method: str, rival: str) -> float:
    """How much better a method ends than its rival; infinite where only the rival diverged."""
    entry, other = comparison.best_entry(method), comparison.best_entry(rival)
    if entry is None or other is None:
        return math.inf if entry is not None else -math.inf if other is not None else 0.0
    return comparison.sign * (other.mean - entry.mean)


def within_noise(comparison: Comparison, method: str, rival: str) -> bool:
    entry, other = comparison.best_entry(method), comparison.best_entry(rival)
    if entry is None or other is None:
        return entry is other
    return difference(entry.scores, other.scores).is_noise


def _sentence(cells: Sequence[Comparison], method: str, rival: str) -> str:
    both = [each for each in cells if _are_both_in(each, method, rival)]
    if not both:
        return ""
    alike = [each for each in both if within_noise(each, method, rival)]
    better = [each for each in both if each not in alike and gain(each, method, rival) > 0]
    worse = [each for each in both if each not in alike and each not in better]
    counts = [
        f"{word} in {len(group)}" + (f" ({'; '.join(map(_short, group))})" if group else "")
        for word, group in (("better", better), ("within noise", alike), ("worse", worse))
    ]
    return (
        f"{METHODS[method].title}, against {METHODS[rival].title}: of {len(both)} cells "
        f"{', '.join(counts)}."
    )


def _short(comparison: Comparison) -> str:
    cell = comparison.cell
    return f"{cell.name} {cell.norm} {cell.depth}, β₂ {cell.beta2:g}"


def _asked(cells: Sequence[Comparison]) -> list[str]:
    """What was asked for, and what there is."""
    sentences = []
    for each in cells:
        cell = each.cell
        is_asked = (cell.task, cell.depth, cell.beta2) == ("gpt", ASKED_DEPTH, ASKED_BETA2)
        if not is_asked or not _are_both_in(each, PROJECTED, MUON):
            continue
        above, rates, wanted = (
            -gain(each, PROJECTED, MUON),
            len(each.good_rates(PROJECTED)),
            len(each.good_rates(MUON)),
        )
        is_met = above <= ASKED and rates >= wanted
        sentences.append(
            f"{cell.title}: asked for were at most {ASKED:g} nats above Muon and as many rates "
            f"that train (as in the next section); it ends {above:+.3f} from Muon and trains at "
            f"{rates} rates, Muon at {wanted}: {'met' if is_met else 'not met'}."
        )
    return sentences


def _edges(cells: Sequence[Comparison]) -> list[str]:
    """At how many cells a method might end better yet, at rates that were not run."""
    both = [each for each in cells if _are_both_in(each, PROJECTED, MUON)]
    counts = [
        f"{METHODS[name].title} in {sum(each.best_rate(name) == each.rates[-1] for each in both)}"
        for name in (PROJECTED, SCALED, MUON)
    ]
    if not both:
        return []
    return [f"Best at the largest rate that was run: of {len(both)} cells {'; '.join(counts)}."]


def _table(cells: Sequence[Comparison]) -> list[str]:
    """A row a cell that has both, with the difference and its standard error."""
    rows = []
    for each in (each for each in cells if _are_both_in(each, PROJECTED, MUON)):
        texts = [each.at_best(name, lambda entry: entry.text) for name in (SCALED, PROJECTED, MUON)]
        rates = [str(len(each.good_rates(name))) for name in (SCALED, PROJECTED, MUON)]
        rows.append([each.cell.title, *texts, _difference(each), " / ".join(rates)])
    head = [METHODS[name].title for name in (SCALED, PROJECTED, MUON)]
    columns = ["Loss or accuracy", *head, "projected less Muon", "rates that train, in this order"]
    return [markdown(columns, rows)] if rows else []


def _difference(comparison: Comparison) -> str:
    entry, other = comparison.best_entry(PROJECTED), comparison.best_entry(MUON)
    if entry is None or other is None:
        return "diverged"
    return difference(entry.scores, other.scores).text
