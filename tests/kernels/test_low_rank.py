"""σ₁ in the first step of matrices of low rank, under every kernel that a CPU has, by SVD; the same
where ranks share them, whose sums round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.kernels.cases import Case, Rank, on_every_rank
from tests.spectral.low_rank import SHAPES, low_rank, signs
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.reference import exact_sigma

#: Ten times what was measured: sums of 60 products in float32.
BELOW, ABOVE = 2e-5, 1e-5

CLIPS: dict[str, dict[str, Any]] = {
    "scale": {"clip": "scale"},
    **{f"project, {n}": {"clip": "project", "io": [], "vectors": n} for n in (4, 8, 16)},
}


def check(sigmas: Iterable[tuple[float, Tensor]]) -> None:
    for sigma, matrix in sigmas:
        error = sigma / exact_sigma(matrix.double()) - 1
        assert -BELOW <= error <= ABOVE, (matrix.shape, error)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kernel", ["torch", "cpu"])
def test_sigmas_of_a_first_step_are_the_exact_ones(
    kernel: str, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    generator = torch.Generator().manual_seed(0)
    ranks = (1, 2, 3)
    pairs = [
        (low_rank(*shape, rank, generator), signs(*shape, rank, generator))
        for shape in SHAPES
        for rank in ranks
    ]
    params = [nn.Parameter(weight.clone()) for weight, _ in pairs]
    for param, (_, sign) in zip(params, pairs, strict=True):
        param.grad = sign.clone()
    named = [(f"w{number}", param) for number, param in enumerate(params)]
    optimizer = AdamW2(named, lr=0.05, tau=0.05, **CLIPS[clip])
    optimizer.step()
    stats = optimizer.stats()
    entries = [stats[name] for name, _ in named]
    check((entry.sigma_weight, pair[0]) for entry, pair in zip(entries, pairs, strict=True))
    check((entry.sigma_update, pair[1]) for entry, pair in zip(entries, pairs, strict=True))


@pytest.mark.parametrize("clip", ["scale", "project, 8"])
@pytest.mark.parametrize("kernel", ["torch", "cpu"])
def test_ranks_that_share_matrices_measure_what_one_process_does(kernel: str, clip: str) -> None:
    shapes = {f"w{number}": shape for number, shape in enumerate(SHAPES)}
    alone = Case(shapes)
    for rank in (1, 2, 3):
        generator = torch.Generator().manual_seed(rank)
        whole = torch.cat([signs(*shape, rank, generator).flatten() for shape in SHAPES])
        assert len(whole) == sum(map(prod, SHAPES))

        def step(rank: Rank, whole: Tensor = whole) -> dict[str, MatrixStats]:
            rank.grads = [whole[rank.range]]
            return rank.step(0.05, sign=1).stats

        with tolerances.every_iteration():
            (expected,) = on_every_rank(alone, kernel, step, **CLIPS[clip])
            ranks = on_every_rank(alone._replace(cuts=(0.2, 0.71)), kernel, step, **CLIPS[clip])
        for stats in ranks:
            assert stats == ranks[0], "ranks differ"
            for name, entry in stats.items():
                assert entry.sigma_update == pytest.approx(expected[name].sigma_update, rel=1e-5)
