"""A small GPT and a small ViT under fourteen methods, over learning rates, depths, norms and seeds.

    python -m examples.compare                       all of it: 2944 runs, about 5 hours on 2 cores
    python -m examples.compare --task vit --depths 6 --norm post --lrs 3e-3 --seeds 0
    python -m examples.compare ladder                four methods as the GPT grows wider
    python -m examples.compare table                 docs/compare.md, its pictures, from the results

Every run appends one line to OUT/results.jsonl, and a run that is there already is skipped: started
again, it goes on where it was stopped or killed. OUT is docs/compare, where the runs that were made
lie. β₂ is 0.95 and, at the smallest depth only, 0.999; with --beta2 all of it at all depths.

A run takes about 5, 11 and 22 seconds of one core at 6, 12 and 24 layers, up to twice that under
Muon.

The tuned warmup: for every task, depth, norm, rate and β₂ one run each over 5, 10, 20 and 50 % of
the steps, with a seed (1000) that is never reported; the reported seeds run with the share that
ended best.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from examples.compare import ladder, table, vit
from examples.compare.grid import Grid
from examples.compare.methods import METHODS, TUNING_SEED
from examples.compare.train import TASKS, Run
from examples.compare.work import make


def grid_of(options: argparse.Namespace) -> Grid:
    """The runs that the options ask for, the quick ones first."""
    depths = sorted(set(options.depths))
    beta2s = (
        [(beta2, depths) for beta2 in options.beta2]
        if options.beta2
        else [(0.95, depths), (0.999, depths[:1])]
    )
    cells = [
        Run(task, depth, norm, "", lr, 0, beta2, options.steps or TASKS[task].steps, 0.0)
        for beta2, depths in beta2s
        for depth, task, norm, lr in product(depths, options.task, options.norm, options.lrs)
    ]
    return Grid(cells, options.methods, options.seeds)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--depths", nargs="+", type=int, default=[6, 12, 24])
    parser.add_argument("--norm", nargs="+", default=["pre", "post"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--beta2", nargs="+", type=float, help="0.95, and 0.999 at the smallest depth"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=", ".join(f"{task.steps} ({name})" for name, task in TASKS.items()),
    )
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/compare"))
    options = parser.parse_args(arguments)
    for key, value in vars(options).items():
        if isinstance(value, list):
            setattr(options, key, list(dict.fromkeys(value)))  # what is given twice is run once
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Raise ValueError with one sentence where an option is impossible."""
    for key, known in (
        ("task", list(TASKS)),
        ("norm", ["pre", "post"]),
        ("methods", list(METHODS)),
    ):
        for value in getattr(options, key):
            if value not in known:
                raise ValueError(f"compare: --{key} got {value!r}, it takes {', '.join(known)}.")
    numbers: list[tuple[str, Callable[[float], bool], str]] = [
        ("depths", lambda depth: depth >= 1, "whole numbers from 1 on"),
        ("lrs", lambda lr: 0 < lr < float("inf"), "numbers above 0"),
        (
            "seeds",
            lambda seed: seed >= 0 and seed != TUNING_SEED,
            f"whole numbers but {TUNING_SEED}, which tunes",
        ),
        ("beta2", lambda beta2: 0 <= beta2 < 1, "numbers from 0 up to, but without, 1"),
    ]
    for key, is_possible, taken in numbers:
        for value in getattr(options, key) or []:
            if not is_possible(value):
                raise ValueError(f"compare: --{key} got {value}, it takes {taken}.")
    for key in ("procs", "steps"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"compare: --{key} got {value}, it takes a whole number from 1 on.")
    if "vit" in options.task:
        vit.digits()


def main(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["table"]:
            return table.main(arguments[1:])
        if arguments[:1] == ["ladder"]:
            return ladder.main(arguments[1:])
        options = parse(arguments)
        grid = grid_of(options)
        make(grid.first(), grid.tuned, options.out, options.procs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
