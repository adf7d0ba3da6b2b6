"""Four methods on the GPT of six layers as it grows wider.

    python -m examples.compare ladder                     widths 64, 128 and 256, to resume as ever
    python -m examples.compare ladder --widths 256 --methods muon adamw2-project
    python -m examples.compare ladder --widths 256 --rate 0.003 --out /tmp/slower

At widths 64 and 128, pre- and post-norm, it is the comparison's own runs: every rate, three seeds,
200 steps of 512 tokens. At 256, pre-norm only, a method trains for 1,000 steps of 2,048 tokens, at
the rate and with the warmup that were best for it at 128, or at another rate, with two seeds. β₂ is
0.95.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from examples.compare.cells import comparisons
from examples.compare.grid import Grid
from examples.compare.methods import METHODS, TUNING_SEED
from examples.compare.results import read
from examples.compare.train import TASKS, Run
from examples.compare.work import make, nothing_tuned

#: AdamW with its best warmup, AdamW² scaled and projected, and Muon.
CONTENDERS = ("warmup", "adamw2-auto", "adamw2-project", "muon")

TASK, DEPTH, BETA2 = "gpt", 6, 0.95
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Rung:
    """What is run at one width."""

    norms: tuple[str, ...] = ("pre", "post")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = TASKS[TASK].steps
    batch: int = 0
    chosen_at: int = 0  # the width whose best rate and warmup are taken; 0: every rate is run


RUNGS: Mapping[int, Rung] = {
    64: Rung(),
    128: Rung(),
    256: Rung(norms=("pre",), seeds=(0, 1), steps=1000, batch=32, chosen_at=128),
}


def template(width: int, rung: Rung, norm: str, lr: float = 0.0, depth: int = DEPTH) -> Run:
    """A run of a rung but for its method, seed and warmup."""
    return Run(TASK, depth, norm, "", lr, 0, BETA2, rung.steps, 0.0, width, rung.batch)


def climb(
    rungs: Mapping[int, Rung],
    widths: Sequence[int],
    methods: Sequence[str],
    out: Path,
    procs: int,
    depth: int = DEPTH,
    rate: float | None = None,
) -> None:
    """Make the runs of these widths that are not there yet, the narrow ones first; where the rate
    was chosen, at ``rate`` if it is given.
    """
    for width in sorted(widths):
        rung = rungs[width]
        if rung.chosen_at:
            chosen = [
                run
                for norm, method in product(rung.norms, methods)
                for run in runs_of_the_best(rungs, width, norm, method, read(out), depth)
            ]
            if rate is not None:
                chosen = [replace(run, lr=rate) for run in chosen]
            # One stopped half-way has every method once.
            chosen.sort(key=lambda run: run.seed)
            make(chosen, nothing_tuned, out, procs)
        else:
            cells = [
                template(width, rung, norm, lr, depth) for norm, lr in product(rung.norms, RATES)
            ]
            grid = Grid(cells, methods, rung.seeds)
            make(grid.first(), grid.tuned, out, procs)


def runs_of_the_best(
    rungs: Mapping[int, Rung],
    width: int,
    norm: str,
    method: str,
    done: Mapping[Run, dict[str, Any]],
    depth: int,
) -> list[Run]:
    """A method's runs at the rate and with the warmup that ended best at a smaller width.

    Raises:
        ValueError: not all of the runs there are made.
    """
    rung = rungs[width]
    below = template(rung.chosen_at, rungs[rung.chosen_at], norm, depth=depth)
    there = [
        run
        for run in done
        if replace(run, method="", lr=0.0, seed=0, warmup=0.0) == below
        and run.method == method
        and run.seed != TUNING_SEED
    ]
    wanted = set(product(RATES, rungs[rung.chosen_at].seeds))
    if wanted - {(run.lr, run.seed) for run in there}:
        raise ValueError(
            f"compare: --widths got {width}, whose rates are those that are best at "
            f"{rung.chosen_at}; it takes all runs of {method} there first."
        )
    (comparison,) = comparisons([done[run] for run in there])
    rate = comparison.best_rate(method)
    if rate is None:
        return []  # it diverged at all of them
    (warmup,) = comparison.entries[method, rate].warmups
    cell = replace(template(width, rung, norm, rate, depth), method=method, warmup=warmup)
    return [replace(cell, seed=seed) for seed in rung.seeds]


def main(arguments: Sequence[str]) -> int:
    """Make the ladder's runs."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--widths", nargs="+", type=int, default=list(RUNGS))
    parser.add_argument("--methods", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--rate", type=float, help="of width 256, in the place of the best at 128")
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/compare"))
    options = parser.parse_args(arguments)
    known: list[tuple[str, Sequence[Any]]] = [("widths", list(RUNGS)), ("methods", list(METHODS))]
    for key, values in known:
        for value in getattr(options, key):
            if value not in values:
                takes = ", ".join(map(str, values))
                raise ValueError(f"compare: --{key} got {value!r}, it takes {takes}.")
    if options.procs < 1:
        raise ValueError(
            f"compare: --procs got {options.procs}, it takes a whole number from 1 on."
        )
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise ValueError(f"compare: --rate got {options.rate}, it takes a number above 0.")
    methods = list(dict.fromkeys(options.methods))
    widths = sorted(set(options.widths))
    climb(RUNGS, widths, methods, options.out, options.procs, rate=options.rate)
    return 0
