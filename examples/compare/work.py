"""Making runs: in processes of their own, each result on the disk before the next."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from examples.compare.methods import TUNING_SEED
from examples.compare.results import Writer, read, writing
from examples.compare.train import TASKS, WIDTH, Run, be_a_worker, train

#: The runs with a tuned warmup, by the results of those that tuned it; by None, without a warmup.
Tuned = Callable[[Mapping[Run, dict[str, Any]] | None], list[Run]]


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
        width = f" width {run.width}" if run.width != WIDTH else ""
        what = (
            f"{run.task} L{run.depth}{width} {run.norm} lr {run.lr:g} β₂ {run.beta2:g} "
            f"seed {run.seed} {run.method}{warmup}"
        )
        ended = f"{end}, {result['seconds']:.1f} s"
        rest = f"{left // 3600:.0f} h {left % 3600 / 60:.0f} min left"
        print(f"[{self.count}/{self.total}] {what}: {ended}; {rest}", flush=True)

    @staticmethod
    def _work(run: Run) -> float:
        """Seconds of a run, up to a factor that they share."""
        batches = run.batch / TASKS[run.task].batch if run.batch else 1.0
        return run.steps * batches * (run.depth + 1.0) * (run.width / WIDTH) ** 2


def nothing_tuned(done: Mapping[Run, dict[str, Any]] | None) -> list[Run]:  # noqa: ARG001
    """Of runs whose warmups are all known."""
    return []


def make(first: Sequence[Run], tuned: Tuned, out: Path, procs: int) -> None:
    """Make all runs that are not there yet: the first, then those whose warmup they tuned."""
    with writing(out) as writer:
        done = read(out)
        # Not known yet is which warmup the tuned runs get; known is how many are to be made.
        made = {replace(run, warmup=0.0) for run in done if run.seed != TUNING_SEED}
        waiting = [run for run in first if run not in done]
        later = [run for run in tuned(None) if run not in made]
        progress = Progress(waiting + later)
        present = len(first) + len(tuned(None)) - progress.total
        print(f"{progress.total} runs to make, {present} are there", flush=True)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
        with ProcessPoolExecutor(procs, get_context("spawn"), be_a_worker) as pool:
            try:
                done |= work(pool, waiting, writer, progress)
                work(pool, [run for run in tuned(done) if run not in done], writer, progress)
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
