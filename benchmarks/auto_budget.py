"""What ``tau="balanced"`` would be with other budgets.

On the small GPT and ViT of examples/compare and a seed of its own; about 5 minutes on one core.

    python -m benchmarks.auto_budget [--depth 6] [--seeds 10]

A column is a budget for the hidden matrices (rule.HIDDEN_BUDGET) and τ of embeddings, positions and
head (rule.IO_TAU); the first is the one that is built in.
"""

from __future__ import annotations

import argparse
from itertools import product
from statistics import mean
from unittest.mock import patch

import torch

from examples.compare.train import TASKS, Run, train
from weyl_megatron import rule

BUDGETS = [(budget, rule.IO_TAU) for budget in (rule.HIDDEN_BUDGET, 0.07, 0.1, 0.3, 0.6)]
BUDGETS.append((rule.HIDDEN_BUDGET, 0.2))


def score(run: Run, budget: float, io_tau: float) -> float:
    """Train once with these in the place of the built-in ones."""
    module = "weyl_megatron.thresholds"
    with patch(f"{module}.HIDDEN_BUDGET", budget), patch(f"{module}.IO_TAU", io_tau):
        result = train(run)
    number = result[TASKS[run.task].score]
    return float("nan") if number is None else float(number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| | " + " | ".join(f"{budget:g}, io {io:g}" for budget, io in BUDGETS) + " |")
    print("| --- |" + " ---: |" * len(BUDGETS))
    for task, norm, lr in product(TASKS, ("post", "pre"), options.lrs):
        runs = [
            Run(
                task=task,
                depth=options.depth,
                norm=norm,
                method="adamw2-auto",
                lr=lr,
                seed=seed,
                beta2=0.95,
                steps=TASKS[task].steps,
                warmup=0.0,
            )
            for seed in options.seeds
        ]
        means = [mean(score(run, budget, tau) for run in runs) for budget, tau in BUDGETS]
        cells = " | ".join(f"{number:.3f}" for number in means)
        print(f"| {task} {norm}-LN, lr {lr:g}, {TASKS[task].score} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
