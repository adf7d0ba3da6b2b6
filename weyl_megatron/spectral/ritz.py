"""The small algebra of an iteration: σ₁ from the Gram matrices of Y = W X and Z = Wᵀ Y, and the
next block from Z.

All of it is of many matrices at once. On a device the host looks at no value, but for torch's own
look at whether ``eigh`` failed, and the number of calls does not grow with that of matrices. A
matrix whose numbers are not finite leaves the others alone.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

#: How far from parallel, relative to rounding, vectors of Y must be to count as directions of their
#: own. In float32 that is 1 % of a squared length: the Gram matrices carry errors of about 1e-6,
#: which a direction of its own then has 100 times.
INDEPENDENT = 1e5

#: An iteration that gained no more than this share of σ₁ is the last, once as many are made as a
#: matrix makes at least. In training 1.4 iterations are made then where 2 may be, and the error of
#: σ₁(U) at the 95th and 99th percentile is 0.17 and 0.66 %, as it is with all of them: 0.12 and
#: 0.60 % (`python benchmarks/estimator.py`).
SETTLED = 0.01

#: Vectors of Z that are closer to parallel than this have nothing new in them but rounding.
_NEW = 1e-5

#: Between these, σ₁² of a vector of length 1 neither overflows nor vanishes in float32.
_SAFE = 1e-9, 1e9

#: The length of vectors for matrices so small that σ₁² at length 1 vanishes in float32; its inverse
#: for large ones.
_LONG = 1e28

#: No vector is longer: float32 ends at 3e38.
_LONGEST = 1e38


def is_seen(tensor: Tensor) -> bool:
    """Whether the host may look into a tensor: on another device it would wait for it."""
    return tensor.device.type == "cpu"


def gram(z: Tensor) -> Tensor:
    """Return Zᵀ Z of every Z, whose vectors are the rows, ``(matrices, b, cols)``.

    What a CPU's batched product rounds hangs on how many there are. Copies of a matrix on ranks
    that hold different others have to stay equal.
    """
    if is_seen(z):
        return torch.stack([each @ each.mT for each in z])
    return z @ z.mT


def products(factors: Tensor, z: Tensor) -> Tensor:
    """Return each factor times its Z, ``(matrices, b, cols)``; see :func:`gram`."""
    if is_seen(z):
        return torch.stack([factor @ each for factor, each in zip(factors, z, strict=True)])
    return factors @ z


def largest_ratio(gram_y: Tensor, gram_z: Tensor, eps: float) -> Tensor:
    """Return max over c of ‖Z c‖ / ‖Y c‖: σ₁ of W on the span of Y, never above σ₁(W) but for
    rounding, ``(...,)``. NaN where a Gram matrix is not finite, 0 where Y is.

    That is the largest singular value of Wᵀ Q with Q = orth(Y), which takes Q from one more pass
    over W.

    Args:
        gram_y, gram_z: Yᵀ Y and Zᵀ Z, ``(..., b, b)``, float64.
        eps: the rounding of what they were made of.
    """
    total = (gram_y + gram_z).sum((-2, -1))
    excess = total - total  # 0, or NaN where one of them is not finite
    is_finite = (excess == 0)[..., None, None]
    basis = basis_of(torch.where(is_finite, gram_y, 0), eps)  # or eigh would raise, for all
    inner = torch.where(is_finite, basis.mT @ gram_z @ basis, 0)
    sigma: Tensor = torch.linalg.eigvalsh(inner)[..., -1].clamp(min=0).sqrt()
    return sigma + excess


def basis_of(gram_y: Tensor, eps: float) -> Tensor:
    """Return columns c with ‖Y c‖ = 1 that are orthogonal in Y, and 0 in place of those in which Y
    is nothing but rounding, ``(..., b, b)``.

    Args:
        gram_y: Yᵀ Y, finite, ``(..., b, b)``, float64.
        eps: the rounding of what it was made of.
    """
    gate = INDEPENDENT * eps
    if not is_seen(gram_y):
        return _by_pivots(gram_y, gate)
    # Where all directions count every basis is as good, and this takes fewer calls.
    scale = gram_y.diagonal(dim1=-2, dim2=-1).rsqrt().nan_to_num(0, 0, 0)[..., None]
    values, vectors = torch.linalg.eigh(gram_y * scale * scale.mT)
    is_kept = values > gate
    basis: Tensor = vectors * scale * torch.where(is_kept, values, inf).rsqrt()[..., None, :]
    is_short = ~is_kept.all(-1)
    if bool(is_short.any()):
        basis[is_short] = _by_pivots(gram_y[is_short], gate)
    return basis


def _by_pivots(gram_y: Tensor, gate: float) -> Tensor:
    """See :func:`basis_of`: Gram and Schmidt's way, next the vector of which the most is left.

    One is left out where its squared rest is below ``gate`` of its squared length. Of a W of low
    rank some vectors are rounding in all their length, and still almost parallel to the others: no
    vector that is longer may be mixed with them, or σ₁ comes out low by their share.
    """
    count = gram_y.shape[-1]
    axes = torch.eye(count, device=gram_y.device, dtype=gram_y.dtype).expand_as(gram_y)
    rests = torch.cat([gram_y, axes], -1)  # their inner products, and what they are made of
    squares = rests.diagonal(dim1=-2, dim2=-1)
    least = gate * squares
    basis = []
    for _ in range(count):
        longest, at = squares.max(-1, keepdim=True)
        is_new = longest > least.gather(-1, at)
        row = rests.take_along_dim(at[..., None], -2)[..., 0, :]
        row = row * torch.where(is_new, longest, inf).rsqrt()
        basis.append(row[..., count:])
        squares.scatter_(-1, at, -inf)  # never again
        rests -= row[..., :count, None] * row[..., None, :]
    return torch.stack(basis, -1)


def gain(gram_y: Tensor, length: Tensor, sigma: Tensor) -> Tensor:
    """Return by what share of itself σ₁ came out of Y and Z = Wᵀ Y above what Y = W X alone tells,
    the last half step, ``(...,)``.

    A matrix whose iteration failed, or was scaled against overflow, gained infinity.

    Args:
        gram_y: Yᵀ Y, ``(..., b, b)``, float64.
        length: of the rows of X, ``(...,)``.
        sigma: what ``largest_ratio`` found, ``(...,)``.
    """
    tells = _is_good(sigma) & _is_one(length)
    gram_y = torch.where(tells[..., None, None], gram_y, 0)
    of_y = torch.linalg.eigvalsh(gram_y)[..., -1].sqrt()
    return torch.where(tells, 1 - of_y / (length * sigma), inf)


def next_block(z: Tensor, old: Tensor, sigma: Tensor, more: Tensor) -> Tensor:
    """Return orthonormal bases ``(matrices, b, cols)`` of the rows of each ``z``, filled up from
    ``old`` where some are alike.

    Rows are of length 1, or of 1 / σ₁ where products would overflow otherwise. Where they did
    overflow or vanish, the old rows are returned at another length, to be tried again if there are
    ``more`` iterations, or else at length 1.

    Args:
        z, old: Z and X, ``(matrices, b, cols)``, float64.
        sigma: what ``largest_ratio`` found, ``(matrices,)``.
        more: whether another iteration may follow, bool ``(matrices,)``.
    """
    if not is_seen(z):  # QR goes from matrix to matrix there
        return _in_any_case(z, old, sigma, more)
    q, r = torch.linalg.qr(z.mT)
    least = _NEW * torch.linalg.vector_norm(z, dim=-1)
    is_plain = (r.diagonal(dim1=-2, dim2=-1).abs() > least).all(-1) & _is_safe(sigma)
    orthonormal: Tensor = q.mT
    if bool(is_plain.all()):
        return orthonormal
    alone = [slice(k, k + 1) for k in range(len(z))]
    blocks = [
        orthonormal[k] if plain else _in_any_case(z[k], old[k], sigma[k], more[k])
        for k, plain in zip(alone, is_plain.tolist(), strict=True)
    ]
    return torch.cat(blocks)


def _in_any_case(z: Tensor, old: Tensor, sigma: Tensor, more: Tensor) -> Tensor:
    """See :func:`next_block`, which this is by masks alone."""
    length = torch.linalg.vector_norm(old[:, 0], dim=-1)
    again = torch.where(sigma == 0, _LONG, 1 / _LONG)
    again = torch.where(more & _is_one(length), again, 1) / length
    scale = torch.where(_is_safe(sigma), 1, (1 / sigma).clamp(max=_LONGEST))
    fresh = _by_projection(z, old) * scale[:, None, None]
    return torch.where(_is_good(sigma)[:, None, None], fresh, old * again[:, None, None])


def _by_projection(z: Tensor, old: Tensor) -> Tensor:
    """Return the rows of ``z`` made orthonormal one after the other, each projected twice; one that
    has nothing new in it gives way to the row of ``old`` in its place, and that to an axis.
    """
    axes = torch.eye(z.shape[1], z.shape[2], device=z.device, dtype=z.dtype)
    rows = torch.empty_like(z)
    candidates = torch.stack([z, old], dim=2)  # (matrices, b, 2, cols)
    least = _NEW * torch.linalg.vector_norm(candidates, dim=-1, keepdim=True)
    for number in range(z.shape[1]):
        pair, before = candidates[:, number], rows[:, :number]
        for _ in range(2 if number else 0):
            pair = torch.baddbmm(pair, pair @ before.mT, before, alpha=-1)
        is_new = torch.linalg.vector_norm(pair, dim=-1, keepdim=True) > least[:, number]
        # Of as many axes as rows one is far from those before.
        axis = axes[before[..., : len(axes)].square().sum(1).argmin(-1)][:, None]
        for _ in range(2 if number else 0):
            axis = torch.baddbmm(axis, axis @ before.mT, before, alpha=-1)
        fallback = torch.where(is_new[:, 1], pair[:, 1], axis[:, 0])
        row = torch.where(is_new[:, 0], pair[:, 0], fallback)
        rows[:, number] = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return rows


def _is_good(sigma: Tensor) -> Tensor:
    return (sigma > 0) & (sigma < inf)


def _is_safe(sigma: Tensor) -> Tensor:
    return (sigma > _SAFE[0]) & (sigma < _SAFE[1])


def _is_one(length: Tensor) -> Tensor:
    """Whether a block is of rows of length 1, and not of those of a second try."""
    return (length > 0.5) & (length < 2)
