"""σ₁ of matrices of low rank: most vectors of Y are then rounding in all their length, and rounding
may be almost parallel to the vectors that are not.
"""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor

from tests.spectral.low_rank import SHAPES, low_rank, signs
from tests.spectral.test_power import flat, whole
from weyl_megatron.reference import exact_sigma
from weyl_megatron.spectral import ritz

#: Ten times what was measured: sums of 60 products in float32.
BELOW, ABOVE = 2e-5, 1e-5

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_sigma_of_a_first_step_is_the_exact_one(path: str, rank: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrices = [make(*shape, rank, generator) for shape in SHAPES for make in (low_rank, signs)]
    sigmas = whole(matrices, widths=(width,)).sigmas([flat(matrices)])[0]
    for matrix, sigma in zip(matrices, sigmas.tolist(), strict=True):
        error = sigma / exact_sigma(matrix.double()) - 1
        assert -BELOW <= error <= ABOVE, (matrix.shape, error)


def gram(y: Tensor) -> Tensor:
    return (y.mT @ y).double()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_vectors_of_rounding_change_nothing_in_the_longest(path: str, share: float) -> None:
    """Planted: u, and rounding that is u but for a share of something else."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, generator=generator) for n in (30, 40))
    left, right = left / left.norm(), right / right.norm()
    others = torch.randn(30, 3, generator=generator)
    rounding = 1e-7 * (left[:, None] + share * others / others.norm(dim=0))
    y = torch.cat([rounding[:, :2], left[:, None], rounding[:, 2:]], dim=1)
    z = torch.outer(right, left) @ y
    assert float(ritz.largest_ratio(gram(y), gram(z), EPS)) == pytest.approx(1, abs=1e-6)


def test_the_basis_is_orthonormal_and_spans_what_is_not_rounding(path: str) -> None:
    """Beside each other: of rank 6, 2 with vectors of lengths far apart, 0."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    short = full[:, :2] @ torch.randn(2, 6, generator=generator, dtype=torch.float64)
    short *= torch.logspace(-12, 12, 6, dtype=torch.float64)
    each = [full, short, torch.zeros_like(full)]
    for eps in (EPS, torch.finfo(torch.float64).eps):
        bases = ritz.basis_of(torch.stack([y.mT @ y for y in each]), eps)
        for y, basis, rank in zip(each, bases, (6, 2, 0), strict=True):
            made = (y @ basis)[:, basis.abs().amax(0) > 0]
            assert made.shape[1] == rank
            # Roundings of float64, 1 / √(100) or 1 / √(2e-11) times as large.
            apart = 1e-12 if eps == EPS else 1e-4
            identity = torch.eye(rank, dtype=torch.float64)
            assert torch.allclose(made.mT @ made, identity, rtol=0, atol=apart)
            unit = y / y.norm(dim=0).clamp(min=1e-300)
            assert float((unit - made @ (made.mT @ unit)).norm()) <= apart


def test_an_estimate_is_of_the_span_where_vectors_are_almost_parallel(path: str) -> None:
    """No nearer than the gate: both directions of two vectors are seen, or the longer one."""
    for share in (0.05, 0.2):
        first = torch.tensor([1.0, 0, 0])
        y = torch.stack([first, 0.5 * (first + share * torch.tensor([0, 1.0, 0]))], dim=1)
        z = torch.diag(torch.tensor([1.0, 3.0, 0])) @ y
        sigma = float(ritz.largest_ratio(gram(y), gram(z), EPS))
        is_seen = share**2 / (1 + share**2) > ritz.INDEPENDENT * EPS
        assert sigma == pytest.approx(3 if is_seen else 1, rel=1e-5)
        assert sqrt(ritz.INDEPENDENT * EPS) == pytest.approx(0.11, abs=0.01)
