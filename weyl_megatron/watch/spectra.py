"""Singular values of a block's weights and of their products, which no rank needs to hold whole.

σ₁ by Lanczos's method on AᵀA, given only as a function on vectors: under tensor parallelism that
function sums over the group. The spectrum of a head's W_qᵀW_k is exact: it is that of (W_qW_qᵀ)^½
(W_kW_kᵀ)^½, of d_q × d_q numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..spectral.blocks import start_block
from ..spectral.step import total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Map = Callable[[Tensor], Tensor]

#: Lanczos steps at most. About so many set apart two singular values that differ by a part in a
#: thousand.
_STEPS = 64

#: The estimate of σ₁² has settled where four more steps change it by less than this share.
_SETTLED = 1e-9


def largest_singular_value(square: _Map, size: int, name: str, like: Tensor) -> float:
    """Return σ₁ of A, of which only x ↦ AᵀA x is given.

    Args:
        square: AᵀA on a vector ``(size,)``, the same on every rank.
        size: columns of A, or rows where ``square`` is AAᵀ.
        name: seeds the start vector: the same at any number of ranks.
        like: gives the device and the dtype of the products; what they are orthogonalised in is
            float64.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    vector = start_block(name, size, 1)[:, 0].to(like.device)
    # (steps, size) in float64: squares of σ₁² need not be float32 numbers.
    basis = vector.unsqueeze(0)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    value = previous = 0.0
    for step in range(1, min(size, _STEPS) + 1):
        new = square(basis[-1].to(dtype)).double()
        alphas.append(basis[-1] @ new)
        for _ in range(2):  # once more, for what rounding left
            new = new - basis.T @ (basis @ new)
        length = new.norm()
        betas.append(length)
        if step % 4 == 0 or step == min(size, _STEPS):
            value = _largest(alphas, betas)
            # A length of rounding's size: all that the start vector reaches is in the basis.
            exhausted = float(length) <= 1e-6 * abs(value)
            if not value > 0 or exhausted or abs(value - previous) <= _SETTLED * value:
                break
            previous = value
        basis = torch.cat([basis, (new / length.clamp(min=1e-300)).unsqueeze(0)])
    return 0.0 if value <= 0 else value**0.5


def _largest(alphas: list[Tensor], betas: list[Tensor]) -> float:
    diagonal = torch.stack(alphas).double().cpu()
    matrix = torch.diag(diagonal)
    if len(alphas) > 1:
        beside = torch.stack(betas[:-1]).double().cpu()
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    if not bool(matrix.isfinite().all()):
        return float("nan")
    return float(torch.linalg.eigvalsh(matrix)[-1])


def sigma_of_rows(matrix: Tensor, name: str, group: ProcessGroup | None = None) -> float:
    """Return σ₁ of a matrix (m, n) of which every rank of ``group`` has some rows, all columns."""
    return largest_singular_value(
        lambda x: total(matrix.T @ (matrix @ x), group), matrix.shape[1], name, matrix
    )


def sigma_of_columns(matrix: Tensor, name: str, group: ProcessGroup | None = None) -> float:
    """Return σ₁ of a matrix (m, n) of which every rank of ``group`` has some columns, all rows."""
    return largest_singular_value(
        lambda x: total(matrix @ (matrix.T @ x), group), matrix.shape[0], name, matrix
    )


def sigma_of_product(
    left: Tensor, right: Tensor, name: str, group: ProcessGroup | None = None
) -> float:
    """Return σ₁ of left (m, r) @ right (r, n), where the ranks of ``group`` share out the r."""

    def square(x: Tensor) -> Tensor:
        y = total(left @ (right @ x), group)
        return total(right.T @ (left.T @ y), group)

    return largest_singular_value(square, right.shape[1], name, right)


def head_spectra(query: Tensor, key: Tensor, heads: int, key_heads: int) -> Tensor:
    """Return the singular values of W_qᵀW_k of every head, ``(heads, d_q)`` in float64.

    The largest comes first. SEC(d_q, s) of Qi et al. is the sum of the s largest squares over that
    of all. Heads that share a key (grouped queries) have it each.

    Args:
        query, key: W_q ``(heads · d_q, d)`` and W_k ``(key_heads · d_q, d)``.
    """
    q = query.double().reshape(heads, -1, query.shape[-1])  # (heads, d_q, d)
    k = key.double().reshape(key_heads, -1, key.shape[-1]).repeat_interleave(heads // key_heads, 0)
    values: Tensor = torch.linalg.svdvals(_root(q @ q.mT) @ _root(k @ k.mT))
    return values


def energy_concentration(singular_values: Tensor, largest: int) -> Tensor:
    """Return SEC(d_q, s) of singular values ``(…, d_q)``: the energy's share in the s largest.

    Args:
        largest: s.
    """
    energy = singular_values.square()
    whole = energy.sum(-1)
    return torch.where(whole > 0, energy[..., :largest].sum(-1) / whole.clamp(min=1e-300), 0.0)


def _root(gram: Tensor) -> Tensor:
    """Return the symmetric root of a positive semidefinite matrix; NaN where it is not finite."""
    if not bool(gram.isfinite().all()):
        return torch.full_like(gram, float("nan"))
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors @ (values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT)
    return root
