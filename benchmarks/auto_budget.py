"""What ``tau="balanced"`` would be with other budgets.

On the small GPT and ViT of examples/compare and a seed of its own; about 5 minutes on one core.

    python -m benchmarks.auto_budget [--depth 6] [--seeds 10]
    python -m benchmarks.auto_budget --clip project --tasks gpt --depth 12 --seeds 10 11

A column is a budget for the hidden matrices (rule.HIDDEN_BUDGET) and τ of embeddings, positions and
head (rule.IO_TAU); the first is the one that is built in. Under "project" they are half and twice
the budget: the mean of the seeds and, with more than one, its standard error.
"""

from __future__ import annotations

import argparse
from itertools import product
from statistics import mean, stdev
from unittest.mock import patch

import torch

from examples.compare.train import TASKS, Run, train
from weyl_megatron import rule

BUDGETS = [(budget, rule.IO_TAU) for budget in (rule.HIDDEN_BUDGET, 0.07, 0.1, 0.3, 0.6)]
BUDGETS.append((rule.HIDDEN_BUDGET, 0.2))
OF_PROJECTION = [(factor * rule.HIDDEN_BUDGET, rule.IO_TAU) for factor in (1.0, 0.5, 2.0)]

#: The comparison's method for each ``clip``.
METHODS = {"scale": "adamw2-auto", "project": "adamw2-project"}


def score(run: Run, budget: float, io_tau: float) -> float:
    """Train once with these in the place of the built-in ones."""
    module = "weyl_megatron.thresholds"
    with patch(f"{module}.HIDDEN_BUDGET", budget), patch(f"{module}.IO_TAU", io_tau):
        result = train(run)
    number = result[TASKS[run.task].score]
    return float("nan") if number is None else float(number)


def _cell(scores: list[float]) -> str:
    spread = f" ± {stdev(scores) / len(scores) ** 0.5:.3f}" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-2])
    parser.add_argument("--clip", choices=METHODS, default="scale")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    budgets = OF_PROJECTION if options.clip == "project" else BUDGETS
    print("| | " + " | ".join(f"{budget:g}, io {io:g}" for budget, io in budgets) + " |")
    print("| --- |" + " ---: |" * len(budgets))
    for task, norm, lr in product(options.tasks, ("post", "pre"), options.lrs):
        runs = [
            Run(
                task=task,
                depth=options.depth,
                norm=norm,
                method=METHODS[options.clip],
                lr=lr,
                seed=seed,
                beta2=0.95,
                steps=TASKS[task].steps,
                warmup=0.0,
            )
            for seed in options.seeds
        ]
        scores = [[score(run, budget, tau) for run in runs] for budget, tau in budgets]
        cells = " | ".join(map(_cell, scores))
        print(f"| {task} {norm}-LN, lr {lr:g}, {TASKS[task].score} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
