"""Rule 1 of the paper as arithmetic: the largest rate at which an update is smooth, and the τ and
the floor that "balanced" (also spelled "auto") picks.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .spectral import ritz

#: What tau="balanced" shares out over a model's hidden matrices: each gets HIDDEN_BUDGET / K.
HIDDEN_BUDGET = 0.144

#: τ of embeddings, positions and the head under tau="balanced".
IO_TAU = 0.1

#: Under tau="balanced" σ₁(W) counts for at least this share of a Xavier matrix's.
BALANCED_FLOOR = 1.0

#: The least τ of an adapter's factor under tau="balanced": a share of the budget among hundreds of
#: factors, each beside a frozen weight, would not let them learn (docs/adapters.md).
ADAPTER_TAU = 0.01

#: Up to this τ a weight changes so slowly that half the iterations of an update find its σ₁ as
#: well.
SLOW_TAU = 0.05

#: Under clip="project" the part of an update that the vectors do not see is taken for this many
#: times as large as the smallest singular value that they see (docs/projection.md).
UNSEEN = 1.5

#: What σ₁ takes for rounding (``ritz.INDEPENDENT``) is still a direction to be clipped: at this
#: share of it a singular value is known to 1 %.
ROUNDING = 1e-2

#: Below this share of the largest, a squared singular value that was seen is rounding.
NOTHING = 1e-10

#: More than what sums of squares in float32 may be off by, relative.
SUMS = 1e-5


def clipped_rates(
    lr: Tensor, tau: Tensor, floor: Tensor, sigma_weight: Tensor, sigma_update: Tensor
) -> Tensor:
    """Return α_W = min(α, τ · max(σ₁(W), floor) / σ₁(U)) for every matrix (Rule 1, equation 6).

    An update of zero is bounded by nothing, nor is any where τ is infinite; a σ₁(W) that is not a
    number counts for the floor. All arguments are vectors of one length, in float64.
    """
    bound = tau * torch.fmax(sigma_weight, floor) / sigma_update
    return torch.minimum(lr, torch.where((sigma_update == 0) | tau.isinf(), torch.inf, bound))


class Projected(NamedTuple):
    """What Rule 1 leaves of updates U where it clips singular values: rate · U + Y M Z."""

    factor: Tensor  #: M, ``(matrices, b, b)``
    rate: Tensor  #: r α: what is left of the part that the vectors do not see
    clipped: Tensor  #: how many of the singular values that they see are above the bound
    share: Tensor  #: ‖rate · U + Y M Z‖_F / ‖α U‖_F


def project(
    grams: tuple[Tensor, Tensor],
    lr: Tensor,
    bound: Tensor,
    norm: Tensor,
    is_whole: Tensor,
    eps: float,
) -> Projected:
    """Return how α U becomes the nearest update whose singular values are at most ``bound``, as far
    as a block of vectors X sees them.

    With Y = U Xᵀ and Z = Yᵀ U, and A such that Aᵀ Yᵀ Y A = 1 and Aᵀ Z Zᵀ A = V Θ² Vᵀ, it is
    U = Σ θᵢ qᵢ wᵢᵀ + the rest, exactly, whether X has converged or not: qᵢ = Y A vᵢ,
    wᵢ = Zᵀ A vᵢ / θᵢ. Each θᵢ becomes min(α θᵢ, bound), and the rest is multiplied by r α, where r
    is what the bound leaves of the largest singular value that may be in it.

    Args:
        grams: Yᵀ Y and Z Zᵀ, ``(matrices, b, b)``, float64.
        lr, bound, norm: α, the bound c and ‖U‖_F of every matrix, float64.
        is_whole: whether a matrix has no more singular values than X has vectors; bool.
        eps: the rounding of what the Gram matrices were made of.
    """
    gram_y, gram_z = grams
    total = (gram_y + gram_z).sum((-2, -1))
    is_finite = (total - total == 0)[:, None, None]
    basis = ritz.basis_of(torch.where(is_finite, gram_y, 0), ROUNDING * eps)
    inner = torch.where(is_finite, basis.mT @ gram_z @ basis, 0)
    squares, vectors = torch.linalg.eigh(inner)  # ascending
    is_seen = (squares > NOTHING * squares[:, -1:]) & (squares > 0)
    theta = torch.where(is_seen, squares, 0).sqrt()
    rest = (norm.square() - theta.square().sum(-1)).clamp(min=0)
    unseen = _unseen(theta, is_seen, norm, rest)
    unseen = torch.where(is_whole & is_seen.all(-1), 0, unseen)
    rate = torch.minimum(lr, bound / unseen)
    kept = torch.minimum(lr[:, None] * theta, bound[:, None])
    factors = torch.where(is_seen, kept / theta - rate[:, None], 0)
    axes = basis @ vectors
    after = kept.square().sum(-1) + rate.square() * rest
    return Projected(
        factor=(axes * factors[:, None]) @ axes.mT,
        rate=rate,
        clipped=(lr[:, None] * theta > bound[:, None]).sum(-1),
        share=after.sqrt() / (lr * norm),
    )


def _unseen(theta: Tensor, is_seen: Tensor, norm: Tensor, rest: Tensor) -> Tensor:
    """Return what the largest singular value of the part that vectors do not see is taken for.

    Args:
        theta, is_seen: the singular values that they see, and which of them are none.
        norm, rest: ‖U‖_F, and the squared norm of the part that they do not see.
    """
    smallest = torch.where(is_seen, theta, torch.inf).amin(-1)  # infinite where none is seen
    return torch.minimum(UNSEEN * smallest, (rest + SUMS * norm.square()).sqrt())


def decay_rates(lr: Tensor, clip: Projected) -> Tensor:
    """Return what multiplies λ W where singular values are clipped: the scheduled rate.

    The share of it that is left of the update, ``lr * clip.share``, is what a scaled matrix gets,
    and ends worse under "balanced" (docs/projection.md has both).
    """
    del clip
    return lr


def random_sigma(rows: int, cols: int, std: float) -> float:
    """Return about the σ₁ of a random (rows, cols) matrix of standard deviation ``std``: std·(√rows
    + √cols).
    """
    return std * (sqrt(rows) + sqrt(cols))


def balanced_floor(rows: int, cols: int) -> float:
    """Return what σ₁ of a (rows, cols) matrix counts for at least under tau="balanced"."""
    return BALANCED_FLOOR * random_sigma(rows, cols, xavier_std(rows, cols))


def xavier_std(rows: int, cols: int) -> float:
    """Return the standard deviation of a Xavier-initialised (rows, cols) matrix."""
    return sqrt(2 / (rows + cols))
