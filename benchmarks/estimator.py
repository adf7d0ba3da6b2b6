"""How far the estimates of σ₁ are off over a training run, per width of the block and number of
iterations.

    python benchmarks/estimator.py [--steps 200]        about 2 minutes on one core

Trains the demo's GPT with AdamW² (exact σ₁ decide the rates, so every estimator sees the same run)
and prints, for the updates U and the weights W, the relative error against SVD: median, 95th and
99th percentile, largest. "1 to 2" are two iterations, the second only where the first gained
(spectral/ritz.py): the optimizer's default, for U. Of all kinds is printed how many were made.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.demo.model import GPT, GPTConfig
from weyl_megatron.reference import AdamW2Reference, exact_sigma
from weyl_megatron.spectral import Block, MatrixSpec, PowerIteration, power, tiles_of_range
from weyl_megatron.spectral.ritz import gain

Estimator = tuple[int, int, int]  # vectors, iterations at least and at most
ESTIMATORS: list[Estimator] = [(block, n, n) for block in (1, 2, 3, 4) for n in (1, 2, 3)]
ESTIMATORS.append((4, 1, 2))


class Watched:
    """Exact σ₁ of one matrix for the optimizer, and every estimator's error beside it."""

    def __init__(self, name: str, errors: dict[Estimator, list[float]]) -> None:
        self.name, self.errors = name, errors
        self.estimators: dict[Estimator, PowerIteration] = {}
        self.made: dict[Estimator, list[int]] = {estimator: [] for estimator in ESTIMATORS}

    def __call__(self, matrix: torch.Tensor) -> float:
        exact = exact_sigma(matrix)
        rows, cols = matrix.shape
        tiles = list(tiles_of_range([Block(0, 0, 0, rows, cols, 0, 0)], cols, 0, rows * cols, 0))
        for estimator in ESTIMATORS:
            block, least, most = estimator
            if estimator not in self.estimators:
                specs = [MatrixSpec(self.name, rows, cols)]
                self.estimators[estimator] = PowerIteration(
                    specs, tiles, iters=most, least=least, widths=(block,)
                )
            counted.clear()
            estimate = self.estimators[estimator].sigmas([[matrix.detach().flatten()]]).item()
            self.errors[estimator].append(1 - estimate / exact)
            self.made[estimator].append(len(counted))
        return exact


#: What each iteration gained, since it was last cleared.
counted: list[float] = []


def counting(*arguments: Any) -> float:
    counted.append(gain(*arguments))
    return counted[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    power.gain = counting
    errors: dict[str, dict[Estimator, list[float]]] = {
        kind: {e: [] for e in ESTIMATORS} for kind in "UW"
    }
    model = GPT(GPTConfig())
    optimizer = AdamW2Reference(
        model.named_parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    watched = {
        name: (Watched(name, errors["W"]), Watched(name, errors["U"])) for name in optimizer.sigma
    }
    optimizer.sigma = dict(watched)
    corpus = load_corpus()
    offsets = training_offsets(corpus, steps, 8, 64, seed=0)
    for step in range(steps):
        model.zero_grad()
        model(*sequences(corpus.train, offsets[step], 64)).backward()
        optimizer.step()
    print(
        f"{steps} steps, {len(optimizer.sigma)} matrices; relative error of σ₁: median / p95 / p99 "
        "/ largest, in %"
    )
    for estimator in ESTIMATORS:
        block, least, most = estimator
        iterations = str(least) if least == most else f"{least} to {most}"
        line = f"block {block}, {iterations} iterations".ljust(27)
        for kind in "UW":
            error = 100 * torch.tensor(errors[kind][estimator]).abs()
            quantiles = [error.median(), error.quantile(0.95), error.quantile(0.99), error.max()]
            made = sum(sum(both["WU".index(kind)].made[estimator][1:]) for both in watched.values())
            line += f"   {kind} {made / (error.numel() - len(watched)):.2f} made: "
            line += " / ".join(f"{value:7.3f}" for value in quantiles)
        print(line)


if __name__ == "__main__":
    main()
