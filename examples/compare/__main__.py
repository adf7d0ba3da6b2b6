"""A small GPT and a small ViT under fourteen methods, over learning rates, depths, norms and seeds.

    python -m examples.compare                       all of it: 2944 runs, about 5 hours on 2 cores
    python -m examples.compare --task vit --depths 6 --norm post --lrs 3e-3 --seeds 0
    python -m examples.compare table                 docs/compare.md and .svg from the results

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
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from examples.compare import table, vit
from examples.compare.methods import METHODS, TUNING_SEED, WARMUPS
from examples.compare.results import Writer, read, writing
from examples.compare.train import TASKS, Run, badness, be_a_worker, train


class Grid:
    """The runs that the options ask for."""

    def __init__(self, options: argparse.Namespace) -> None:
        depths = sorted(set(options.depths))
        beta2s = (
            [(beta2, depths) for beta2 in options.beta2]
            if options.beta2
            else [(0.95, depths), (0.999, depths[:1])]
        )
        self.cells = [
            (task, depth, norm, lr, beta2, options.steps or TASKS[task].steps)
            for beta2, depths in beta2s
            for depth, task, norm, lr in product(depths, options.task, options.norm, options.lrs)
        ]
        self.methods, self.seeds = options.methods, options.seeds

    def first(self) -> list[Run]:
        """All runs that wait for no other, the quick ones first, the tuning among them."""
        return [
            _run(cell, method, seed, warmup)
            for cell in self.cells
            for method in self.methods
            for seed, warmup in self._seeds_and_warmups(METHODS[method].warmup)
        ]

    def tuned(self, done: dict[Run, dict[str, Any]] | None = None) -> list[Run]:
        """The reported runs with the warmup that ended best, or without one if none is done."""
        runs = []
        for method in (name for name in self.methods if METHODS[name].warmup is None):
            for cell in self.cells:
                best = 0.0
                if done is not None:
                    tuning = [_run(cell, method, TUNING_SEED, warmup) for warmup in WARMUPS]
                    best = min(tuning, key=lambda run: badness(done[run])).warmup
                runs += [_run(cell, method, seed, best) for seed in self.seeds]
        return runs

    def _seeds_and_warmups(self, warmup: float | None) -> Iterable[tuple[int, float]]:
        if warmup is None:
            return product([TUNING_SEED], WARMUPS)
        return product(self.seeds, [warmup])


def _run(
    cell: tuple[str, int, str, float, float, int], method: str, seed: int, warmup: float
) -> Run:
    task, depth, norm, lr, beta2, steps = cell
    return Run(task, depth, norm, method, lr, seed, beta2, steps, warmup)


class Progress:
    """One line a run, with the time that is left by the time that was taken."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.count, self.total = 0, len(runs)
        self.work, self.total_work = 0.0, sum(map(self._work, runs))
        self.start = time.monotonic()

    def add(self, run: Run, result: dict[str, Any]) -> None:
        self.count, self.work = self.count + 1, self.work + self._work(run)
        left = (time.monotonic() - self.start) * (self.total_work - self.work) / self.work
        score = TASKS[run.task].score
        end = "diverged" if result["diverged"] else f"{score} {result[score]:.3f}"
        warmup = f" ({run.warmup:.0%})" if run.warmup else ""
        what = (
            f"{run.task} L{run.depth} {run.norm} lr {run.lr:g} β₂ {run.beta2:g} seed {run.seed} "
            f"{run.method}{warmup}"
        )
        ended = f"{end}, {result['seconds']:.1f} s"
        rest = f"{left // 3600:.0f} h {left % 3600 / 60:.0f} min left"
        print(f"[{self.count}/{self.total}] {what}: {ended}; {rest}", flush=True)

    @staticmethod
    def _work(run: Run) -> float:
        """Seconds of a run, up to a factor that they share."""
        return run.steps * (run.depth + 1.0)


def compare(options: argparse.Namespace) -> None:
    """Make all runs of the grid that are not there yet."""
    grid = Grid(options)
    with writing(options.out) as writer:
        done = read(options.out)
        # Not known yet is which warmup the tuned runs get; known is how many are to be made.
        made = {replace(run, warmup=0.0) for run in done if run.seed != TUNING_SEED}
        waiting = [run for run in grid.first() if run not in done]
        later = [run for run in grid.tuned() if run not in made]
        progress = Progress(waiting + later)
        present = len(grid.first() + grid.tuned()) - progress.total
        print(f"{progress.total} runs to make, {present} are there", flush=True)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
        with ProcessPoolExecutor(options.procs, get_context("spawn"), be_a_worker) as pool:
            try:
                done |= work(pool, waiting, writer, progress)
                work(pool, [run for run in grid.tuned(done) if run not in done], writer, progress)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def work(
    pool: ProcessPoolExecutor, runs: Sequence[Run], writer: Writer, progress: Progress
) -> dict[Run, Any]:
    """Make `runs`, each in the first process that is free, and write down each as it ends."""
    results, futures = {}, {pool.submit(train, run): run for run in runs}
    for future in as_completed(futures):
        run, result = futures[future], future.result()
        writer.write(result)
        progress.add(run, result)
        results[run] = result
    return results


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
        compare(parse(arguments))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
