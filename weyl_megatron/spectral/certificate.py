"""The certificate: when a bound from earlier steps and one norm prove that Rule 1 does not clip,
and no iteration is needed.

The clip is inactive where α σ₁(U) ≤ τ σ₁(W). Two bounds decide that without measuring either σ₁:

* σ₁(U) ≤ ‖U‖_F, which costs nothing where U is formed;
* σ₁(W) ≥ b, where b is the last estimate (never above σ₁(W)), less what every step since may have
  taken from it. By Weyl's inequality σ₁(W − αλW − αU) ≥ (1 − αλ) σ₁(W) − α ‖U‖_F.

All of it is arithmetic on vectors of one number per matrix, float64, equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import MatrixSpec

#: More than what sums in float32 may be off by, relative: a norm counts for so much more, an
#: estimate for less.
SLACK = 1e-3

#: A matrix is expected to be settled if it would be at a norm of the update this much larger than
#: the last.
_GROWTH = 1.05

#: Squares of α U are float32.
_LEAST_RATE = 1e-12

#: Elements of U are a few units, and α U is rounded to float32: of a W smaller than that nothing
#: would be left.
_LEAST_LIMIT = 1e-6

#: Weights whose sum of squares is not, up to summation order, what the last step left have been
#: changed by others.
_SAME = 1e-5


def are_same(squares: Tensor, known: Tensor) -> Tensor:
    """Return of which weights Σ w² shows that they are those of which it was ``known``; False also
    where it overflows.
    """
    return (squares - known).abs() <= _SAME * known


class Certificate:
    """A lower bound of σ₁(W) of every matrix, which follows every step.

    Args:
        matrices: all of a group, in order.
        eps: rounding of the weights' dtype.
        device: of the vectors.
    """

    def __init__(self, matrices: Sequence[MatrixSpec], eps: float, device: torch.device) -> None:
        ranks = torch.tensor(
            [float(min(matrix.rows, matrix.cols)) for matrix in matrices], dtype=torch.float64
        )
        # Storing W rounds it by at most 2 ε |W| elementwise, a matrix of norm 2 ε ‖W‖_F ≤ 2 ε √rank
        # σ₁(W).
        self.kept_on_host = (1 - 2 * eps * ranks.sqrt()).clamp(min=0)
        self.kept = self.kept_on_host.to(device)
        self.lower = torch.zeros_like(self.kept)  #: never above σ₁(W)
        self.norm = torch.full_like(self.kept, torch.inf)  #: ‖U‖_F of the last step
        #: steps since the matrix was measured
        self.age = torch.zeros(len(ranks), dtype=torch.int64, device=device)
        #: Σ w² of this rank's pieces of W, as the last step left them
        self.squares = torch.full_like(self.kept, torch.nan)

    def forget(self) -> None:
        """Trust in nothing: the weights, or the moments, are others now."""
        self.lower.zero_()
        self.norm.fill_(torch.inf)
        self.age.zero_()
        self.squares.fill_(torch.nan)

    def saved(self) -> list[Tensor]:
        """Return what the next step takes from the last one, as a checkpoint holds it."""
        return [self.lower, self.norm, self.age, self.squares]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Take it back. Where the weights are not those it was said of, their squares show it."""
        for vector, restored in zip(self.saved(), saved, strict=True):
            vector.copy_(restored)

    def move_to(self, rows: Tensor) -> None:
        """Keep its vectors from now on in ``rows``, ``(4, matrices)``, where kernels read and write
        them.
        """
        for row, vector in zip(rows, self.saved(), strict=True):
            row.copy_(vector)
        self.lower, self.norm, self.age, self.squares = rows

    def forecast(self, lr: Tensor, limit: Tensor, decay: Tensor) -> Tensor:
        """Return the matrices that will most likely be settled, so that the step may be made before
        it is known.

        Args:
            lr, limit, decay: the scheduled rate α, τ · max(b, floor) and αλ of every matrix. Where
                the decay is a half and more, or W is next to nothing beside α U, a step could not
                be taken back; where α is next to nothing, α U could not be measured.
        """
        can_undo = (decay < 0.5) & (limit > _LEAST_LIMIT * lr)
        return (lr * self.norm * _GROWTH <= limit) & can_undo & (lr > _LEAST_RATE)

    def settles(self, lr: Tensor, limit: Tensor, norm: Tensor) -> Tensor:
        """Return the matrices whose clip is proved inactive; False where a norm is not a number."""
        return lr * norm * (1 + SLACK) <= limit

    def are_others(self, squares: Tensor) -> Tensor:
        """Return the matrices of whose pieces on this rank ``squares``, Σ w² before the step, shows
        other weights.
        """
        # Where they are NaN, nothing is known of the weights, nor trusted but τ = ∞.
        return ~(are_same(squares, self.squares) | self.squares.isnan())

    def measured(self, mask: Tensor, sigma_weight: Tensor) -> None:
        """Take the estimates of σ₁(W), before the step, of the matrices that were measured."""
        lower = torch.nan_to_num(sigma_weight, nan=0.0) * (1 - SLACK)
        self.lower = torch.where(mask, lower, self.lower)
        self.age = torch.where(mask, 0, self.age + 1)

    def moved(
        self, rates: Tensor, decay: Tensor, norm: Tensor, squares: Tensor, mask: Tensor
    ) -> None:
        """Follow a step at ``rates``.

        Args:
            rates: α_W of every matrix.
            decay: α_W λ.
            norm: ‖U‖_F.
            squares: Σ w² of this rank's pieces after it.
            mask: the matrices that this rank moved; of the others ``squares`` knows nothing.
        """
        lower = ((1 - decay) * self.lower - rates * norm * (1 + SLACK)) * self.kept
        self.lower = torch.nan_to_num(lower, nan=0.0).clamp(min=0)
        self.norm, self.squares = norm, torch.where(mask, squares, self.squares)
