"""Matrices of low rank, as updates and weights of small layers are."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

#: Their shorter side is below, at and above the width of a block.
SHAPES = [
    (1, 9),
    (9, 1),
    (2, 3),
    (3, 20),
    (20, 3),
    (4, 4),
    (7, 5),
    (8, 15),
    (5, 8),
    (16, 16),
    (30, 40),
    (16, 33),
    (60, 12),
]


def low_rank(rows: int, cols: int, rank: int, generator: Generator) -> Tensor:
    """Return a matrix whose singular values are up to three digits apart."""
    left = torch.randn(rows, rank, generator=generator)
    sizes = 10 ** (-3 * torch.rand(rank, generator=generator))
    return left * sizes @ torch.randn(rank, cols, generator=generator)


def signs(rows: int, cols: int, rank: int, generator: Generator) -> Tensor:
    """Return ones and minus ones, columns of ``rank`` kinds: Adam's first update is sign(G)."""
    kinds = torch.randn(rows, rank, generator=generator).sign()
    chosen = torch.randint(rank, (cols,), generator=generator)
    return kinds[:, chosen] * torch.randn(cols, generator=generator).sign()
