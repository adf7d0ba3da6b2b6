"""How often ``weyl-megatron plan --run`` is right about runs of examples/compare.

    python -m benchmarks.advice --task gpt               the half on which its rules were chosen
    python -m benchmarks.advice --task vit               the half on which they are judged

Trains the first 100 of 200 steps, seed 0, watched every 10, asks for advice, and looks up in
docs/compare/results.jsonl how the run and the advised one ended (three seeds, mean): the regret is
how much worse than the best of AdamW, τ = 0.01, 0.004 and balanced at four rates. An advised rate
that no run has is trained here. Beside it: the run's own regret, and that of two rules that look
at nothing, balanced at the run's rate and balanced at 0.01. A run takes 5 to 20 seconds of one
core, and is kept in OUT.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from examples.compare import results
from examples.compare.methods import METHODS
from examples.compare.train import TASKS, Run, schedule, train
from weyl_megatron.plan.advice import Advice, advise, look
from weyl_megatron.report.runs import read_run
from weyl_megatron.watch import Watch

STEPS, WATCHED, EVERY = 200, 100, 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parents[1] / "docs" / "compare"

#: Steps, width and batch of the comparison's runs; others are the ladder's.
SHAPE = (STEPS, Run.width, Run.batch)

#: The methods that are watched, and the τ of each.
TAUS = {"adamw": math.inf, "adamw2": 0.01, "adamw2-slow": 0.004, "adamw2-auto": "balanced"}
BALANCED = "adamw2-auto"

#: Up to this regret an advice is right; standard errors of the comparison are about half of it.
NEAR = {"loss": 0.05, "accuracy": 0.02}

#: What a run counts for whose loss was not finite.
NOTHING = {"loss": math.inf, "accuracy": 0.0}


class Judged(NamedTuple):
    """A run, what was advised, and the regret of each."""

    run: Run
    advice: Advice
    advised: Run
    own: float
    regret: float
    same_rate: float
    constant: float

    @property
    def is_right(self) -> bool:
        return self.regret <= NEAR[TASKS[self.run.task].score]


def watch_run(run: Run, out: Path) -> Path:
    """Train the first steps of a run, watched, unless that was done before; return its folder."""
    task, method = TASKS[run.task], METHODS[run.method]
    name = f"{run.task}-L{run.depth}-{run.norm}-{run.method}-{run.lr:g}-b{run.beta2:g}-s{run.seed}"
    folder = out / name
    if (folder / "done").exists():
        return folder
    (folder / "stability.jsonl").unlink(missing_ok=True)
    torch.manual_seed(run.seed)
    model = task.model(run.depth, run.norm, run.width)
    (optimizer,) = method.optimizers(model, run.lr, run.beta2)
    watch = Watch(model, optimizer, every=EVERY, out=folder)
    for step, (inputs, targets) in enumerate(task.batches(run.steps, run.seed)):
        if step == WATCHED:
            break
        for group in optimizer.param_groups:
            group["lr"] = run.lr * schedule(step, run.steps, 0.0)
        loss = model(inputs, targets)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss)
    watch.close()
    (folder / "done").touch()
    return folder


@cache
def known() -> dict[Run, dict[str, Any]]:
    return results.read(RESULTS)


@cache
def ended(run: Run) -> float:
    """The mean over the seeds of how runs ended: a loss, or an error rate."""
    runs = [replace(run, seed=seed) for seed in SEEDS]
    scores = []
    for each in runs:
        result = known().get(each) or train(each)
        score = result[TASKS[run.task].score]
        scores.append(NOTHING[TASKS[run.task].score] if score is None else score)
    average = mean(scores)
    return average if TASKS[run.task].score == "loss" else 1 - average


def same_rate() -> Iterable[str]:
    """A line for each method: how often balanced ended better at the same rate."""
    cells = [replace(run, seed=0) for run in known() if run.method == BALANCED]
    cells = [run for run in dict.fromkeys(cells) if (run.steps, run.width, run.batch) == SHAPE]
    yield ""
    for method in TAUS:
        pairs = [
            (ended(run), ended(replace(run, method=method)), NEAR[TASKS[run.task].score])
            for run in cells
            if method != BALANCED and replace(run, method=method) in known()
        ]
        if pairs:
            better = sum(balanced < other for balanced, other, _ in pairs)
            worse = sum(balanced > other + near for balanced, other, near in pairs)
            yield (
                f"At the same rate balanced ended better than {METHODS[method].title} in {better} "
                f"of {len(pairs)} cells, and worse by more than {NEAR['loss']:g} nats or "
                f"{NEAR['accuracy']:g} of accuracy in {worse}."
            )


def judge(run: Run, out: Path) -> Judged:
    """Watch a run, ask for advice, and look up how it would have ended."""
    folder = watch_run(run, out)
    advice = advise(look(read_run(folder), folder))
    advised = replace(run, method=BALANCED, lr=_rate(advice.lr))
    best = min(ended(replace(run, method=name, lr=lr)) for name, lr in product(TAUS, RATES))
    return Judged(
        run,
        advice,
        advised,
        own=ended(run) - best,
        regret=ended(advised) - best,
        same_rate=ended(replace(run, method=BALANCED)) - best,
        constant=ended(replace(run, method=BALANCED, lr=1e-2)) - best,
    )


def _rate(lr: float) -> float:
    """The nearest of the rates that the comparison would have: 1 and 3 of each decade."""
    rates = (factor * 10.0**decade for decade in range(-6, 1) for factor in (1, 3))
    return float(f"{min(rates, key=lambda rate: abs(math.log(rate / lr))):g}")


def rows(judged: Iterable[Judged]) -> Iterable[str]:
    """A line a run."""
    yield "| run | τ | rate | its regret | advised τ | advised rate | regret | right |"
    yield "| --- | --- | ---: | ---: | --- | ---: | ---: | --- |"
    for each in judged:
        run = each.run
        cells = [
            f"{run.task} {run.norm}-LN, {run.depth} layers",
            "AdamW" if TAUS[run.method] == math.inf else str(TAUS[run.method]),
            f"{run.lr:g}",
            f"{each.own:.3f}",
            str(each.advice.tau),
            f"{each.advised.lr:g}",
            f"{each.regret:.3f}",
            "yes" if each.is_right else "no",
        ]
        yield f"| {' | '.join(cells)} |"


def summary(judged: Sequence[Judged]) -> Iterable[str]:
    """A line for each kind of model, and one for all of a task."""
    yield ""
    yield (
        "| runs | right | regret, mean (largest) | of the run itself | balanced, the run's rate "
        "| balanced, 0.01 |"
    )
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    groups: dict[str, list[Judged]] = defaultdict(list)
    for each in judged:
        run = each.run
        score = TASKS[run.task].score
        groups[f"{run.task} {run.norm}-LN, {run.depth} layers, {score}"].append(each)
        groups[f"{run.task}, all, {score}"].append(each)
    for name in sorted(groups, key=lambda name: ("all" in name, name)):
        group = groups[name]
        keys = ("own", "same_rate", "constant")
        means = (mean(getattr(each, key) for each in group) for key in keys)
        own, same, constant = (f"{value:.3f}" for value in means)
        regrets = [each.regret for each in group]
        right = f"{sum(each.is_right for each in group)} of {len(group)}"
        cells = [name, right, f"{mean(regrets):.3f} ({max(regrets):.3f})", own, same, constant]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--depths", nargs="+", type=int, default=[6, 12])
    parser.add_argument("--norm", nargs="+", default=["pre", "post"])
    parser.add_argument("--methods", nargs="+", default=list(TAUS))
    parser.add_argument("--lrs", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--out", type=Path, default=Path("out/advice"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [
        Run(task, depth, norm, method, lr, 0, 0.95, STEPS, 0.0)
        for depth, task, norm, method, lr in product(
            sorted(options.depths), options.task, options.norm, options.methods, options.lrs
        )
    ]
    judged = [judge(run, options.out) for run in runs]
    for line in (*rows(judged), *summary(judged), *same_rate()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
