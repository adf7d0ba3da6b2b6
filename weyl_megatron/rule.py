"""Rule 1 of the paper as arithmetic: the largest rate at which an update is smooth, and the τ and
the floor that "balanced" (also spelled "auto") picks.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

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


def clipped_rates(
    lr: Tensor, tau: Tensor, floor: Tensor, sigma_weight: Tensor, sigma_update: Tensor
) -> Tensor:
    """Return α_W = min(α, τ · max(σ₁(W), floor) / σ₁(U)) for every matrix (Rule 1, equation 6).

    An update of zero is bounded by nothing, nor is any where τ is infinite; a σ₁(W) that is not a
    number counts for the floor. All arguments are vectors of one length, in float64.
    """
    bound = tau * torch.fmax(sigma_weight, floor) / sigma_update
    return torch.minimum(lr, torch.where((sigma_update == 0) | tau.isinf(), torch.inf, bound))


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
