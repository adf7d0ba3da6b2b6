"""How far ahead the certificate is sure to hold, whatever gradients come: what a host that does not
wait for its device relies on.

A device tells the bound b of σ₁(W) and ‖U‖_F after a step; the host reads them two steps late, when
they have long arrived. What the steps between may have done is bounded. With m, v and the bias
corrections c of one step and, primed, of the next, d = √v̂ + ε, and g any gradient,

    d'² ≥ (β₂ c₂/c₂') d² + (1 − β₂) g²/c₂'

so that by Cauchy and Schwarz each element of the next update has

    u'² ≤ β₁² c₁² c₂' / (β₂ c₂ c₁'²) u²  +  (1 − β₁)² c₂' / ((1 − β₂) c₁'²),

and so do the sums of squares, the last term times m·n. As c₁ ≤ c₁', c₂' ≤ 1, and c₂'/c₂ and 1/c₁'
fall as steps are made, the corrections of an earlier step are an upper bound, too: what is counted
here may be less than what was made.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from .certificate import SLACK


class Steps(NamedTuple):
    """What a step is made with, of every matrix: float64 ``(matrices,)`` each, on the CPU, alike on
    all ranks that share the matrix. NaN: nothing is known.
    """

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor


class Horizon:
    """Bounds of σ₁(W) from below and of ‖U‖_F from above that hold for the step to come.

    All of it is arithmetic on what ranks that share a matrix know alike, whenever they ask.

    Args:
        sizes: m · n of every matrix, float64 ``(matrices,)``.
        kept: the share of σ₁(W) that rounding leaves (``Certificate``).
    """

    def __init__(self, sizes: Tensor, kept: Tensor) -> None:
        self._sizes, self._kept = sizes, kept
        self._counted = torch.zeros_like(sizes)  # steps with an update, of which a device told
        self.forget()

    def forget(self) -> None:
        """Rely on nothing: weights or moments are others now."""
        self._counted.zero_()
        self._lower = torch.zeros_like(self._sizes)
        self._squares = torch.full_like(self._sizes, inf)  # ‖U‖_F², of the last step
        self._last: Steps | None = None
        self._told = 0  # steps
        self._at_least = self._counted.clone()  # what was counted when 1, 2, 4, … had been told
        self._growth: tuple[Steps, Tensor, Tensor] | None = None  # after so many, with some betas

    def count(self, norm: Tensor) -> None:
        """Count a step that is not read: ``norm`` is what a device told of it."""
        self._counted += (norm > 0) & (norm < inf)
        self._told += 1
        if self._told & (self._told - 1) == 0:
            self._at_least, self._growth = self._counted.clone(), None

    def read(self, lower: Tensor, norm: Tensor, step: Steps) -> None:
        """Take what a device told after a step; the steps since are to :meth:`follow`.

        Args:
            lower: b, never above σ₁(W).
            norm: ‖U‖_F; 0 tells nothing of M and V: there may have been no gradient.
            step: what it was made with.
        """
        self.count(norm)
        is_known = (norm > 0) & (norm < inf)
        squares = norm.square().mul_((1 + SLACK) ** 2)
        self._squares = torch.where(is_known, squares, inf)
        self._lower, self._last = lower.nan_to_num(nan=0.0), step

    def follow(self, step: Steps) -> None:
        """Follow a step at any rates up to α, or none."""
        squares = self._next_squares(step)
        most = squares.sqrt().mul_(step.lr).mul_(1 + SLACK)
        lower = (self._lower - self._lower * step.lr * step.weight_decay - most).mul_(self._kept)
        self._lower = lower.nan_to_num_(nan=0.0, neginf=0.0).clamp_(min=0)
        self._squares = torch.maximum(self._squares, squares)
        self._last = step

    def sure(self, step: Steps, tau: Tensor, floor: Tensor) -> Tensor:
        """Return the matrices that the certificate is sure to settle in a step, bool
        ``(matrices,)``.

        Args:
            step: what it is to be made with.
            tau, floor: τ and what σ₁(W) is taken for at least.
        """
        most = self._next_squares(step).sqrt().mul_(step.lr).mul_(1 + SLACK)
        return (most <= torch.maximum(self._lower, floor).mul_(tau)) | (tau == inf)

    def _next_squares(self, step: Steps) -> Tensor:
        """Return the bound of ‖U‖_F² in the step after the last one."""
        last = self._last
        if last is None:
            return torch.full_like(self._sizes, inf)
        if self._growth is None or not _are_same(step, self._growth[0]):
            self._growth = step, *self._growth_with(step)
        _, grown, added = self._growth
        squares = torch.addcmul(added, grown, self._squares)
        if _are_same(step, last):
            return squares
        # With other betas u was made with other corrections.
        follows = (step.beta1 == last.beta1) & (step.beta2 == last.beta2)
        return torch.where(follows, squares, inf)

    def _growth_with(self, step: Steps) -> tuple[Tensor, Tensor]:
        """Return the factor of ‖U‖_F² in its next bound, and what is added to it."""
        # What fewer steps would give is a bound, too.
        b1, b2, n = step.beta1, step.beta2, self._at_least
        grown = b1**2 / b2 * (1 - b2 ** (n + 1)) / (1 - b2**n)
        added = (1 - b1) ** 2 / ((1 - b2) * (1 - b1 ** (n + 1)) ** 2) * self._sizes
        return grown.nan_to_num(nan=inf, posinf=inf), added.nan_to_num(nan=inf, posinf=inf)


def _are_same(step: Steps, other: Steps) -> bool:
    """Whether two steps have the same vectors of betas."""
    return step.beta1 is other.beta1 and step.beta2 is other.beta2
