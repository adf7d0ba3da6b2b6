"""How far σ₁(U) is underestimated where the vectors do not know each step's gradient.

    python -m benchmarks.fresh_directions [--steps 60]

It takes about a minute on one core.

The block of vectors knows the updates before. A gradient of rank one that is another in every step,
or one that fills another column in every step (an embedding's token), is the worst that an update
can bring: in training directions persist. Prints, per matrix and ``power_iters``, how far the
estimate is below SVD's σ₁(U) and how large the step was against what Rule 1 allows,
‖ΔW‖₂ / (τ σ₁(W)): median, 95th percentile, largest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from weyl_megatron import AdamW2
from weyl_megatron.reference import exact_sigma

TAU, LR = 0.01, 1.0

#: Steps before the first that counts: the vectors are warm, as far as they can be.
_WARM = 10


def rank_one(rows: int, cols: int) -> Tensor:
    """A gradient a bᵀ with a and b drawn anew."""
    return torch.randn(rows, 1) @ torch.randn(1, cols)


def one_column(rows: int, cols: int) -> Tensor:
    """A gradient in one column, drawn anew."""
    grad = torch.zeros(rows, cols)
    grad[:, torch.randint(cols, ())] = torch.randn(rows)
    return grad


def drifting(rows: int, cols: int) -> Tensor:
    """Eight directions that stay, and noise: what training looks like; for comparison."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(extent, 8, generator=generator) for extent in (rows, cols))
    return (left * torch.randn(8)) @ right.T + torch.randn(rows, cols)


CASES: dict[str, tuple[Callable[[int, int], Tensor], int, int]] = {
    "rank one, 256 × 256": (rank_one, 256, 256),
    "rank one, 256 × 1024": (rank_one, 256, 1024),
    "one column, 64 × 5000": (one_column, 64, 5000),
    "eight that stay, 256 × 256": (drifting, 256, 256),
}


def measure(case: str, power_iters: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return, per step, by how much of itself σ₁(U) was underestimated, and ‖ΔW‖₂ / (τ σ₁(W))."""
    draw, rows, cols = CASES[case]
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(rows, cols) / cols**0.5)
    optimizer = AdamW2([("w", weight)], lr=LR, weight_decay=0.0, tau=TAU, power_iters=power_iters)
    below, moved = [], []
    for number in range(_WARM + steps):
        before = weight.detach().clone()
        weight.grad = draw(rows, cols)
        optimizer.step()
        if number >= _WARM:
            stats = optimizer.stats()["w"]
            change = exact_sigma(weight.detach() - before)
            below.append(1 - stats.sigma_update * stats.lr / change)
            moved.append(change / (TAU * exact_sigma(before)))
    return torch.tensor(below), torch.tensor(moved)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print("| gradient | power_iters | σ₁(U) below SVD's, % | ‖ΔW‖₂ / (τ σ₁(W)) |")
    print("| --- | ---: | ---: | ---: |")
    for case in CASES:
        for power_iters in (1, 2, 4, 8):
            below, moved = measure(case, power_iters, steps)
            cells = f"{_quantiles(100 * below, 1)} | {_quantiles(moved, 3)}"
            print(f"| {case} | {power_iters} | {cells} |")


def _quantiles(values: Tensor, digits: int) -> str:
    quantiles = values.median(), values.quantile(0.95), values.max()
    return " / ".join(f"{float(value):.{digits}f}" for value in quantiles)


if __name__ == "__main__":
    main()
