"""Which matrices make which iterations: the plan of a step, which every kernel follows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from . import ritz


class Iterations:
    """How many iterations every matrix makes: at most, and whatever they gain.

    Of an iteration beyond ``least`` the one before it decides: where that gained no more than
    ``ritz.SETTLED``, the matrix is done. A matrix is in several operands (W and U), each of which
    has iterations of its own.

    All of it is equal on all ranks that share a matrix. ``most`` and ``least`` come from what they
    all know. The gains come from sums over all of them, of which every rank gets the same bits, and
    from arithmetic that is one on all of them: ``MatrixGroup`` checks the kernels.

    From run to run, and from layout to layout, sums round in other ways. A gain that is
    ``ritz.SETTLED`` but for a rounding then makes one iteration more or less, and σ₁ differs by
    what that gains. No rounding of the gain nor a second threshold changes that: whatever takes two
    values has a place where it jumps. tests/tolerances.py says by how much.

    Args:
        most: iterations at most, int64 ``(operands, matrices)``; 0 leaves a matrix alone.
        least: iterations that are made whatever they gain, likewise.
        begun: by operand, the matrices whose first products were begun elsewhere, uint8
            ``(matrices,)``.
    """

    def __init__(
        self,
        most: Tensor,
        least: Tensor,
        begun: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.most, self.least = most, least
        self.settled = ritz.SETTLED
        self._begun = begun or {}
        self._rounds: list[int] = most.amax(1).tolist() if most.numel() else [0] * len(most)

    @property
    def count(self) -> int:
        """Iterations that any matrix makes at most."""
        return max(self._rounds, default=0)

    def making(self, number: int, gains: Tensor) -> dict[int, Tensor]:
        """Return, by operand, the matrices that make iteration ``number``, uint8 ``(matrices,)``.

        An operand is left out where none of its matrices do.

        Args:
            number: of the iteration, from 0.
            gains: what the last iteration of each matrix gained, ``(operands, matrices)``.
        """
        operands = [operand for operand, rounds in enumerate(self._rounds) if number < rounds]
        making = {operand: self._at_most[number, operand] for operand in operands}
        if number == 0:
            return making
        for operand in operands:
            goes_on = self._at_least[number, operand] | ~(gains[operand] <= self.settled)  # NaN: on
            making[operand] = making[operand] & goes_on
        return {o: mask for o, mask in making.items() if bool(mask.any())}

    def beginning(self, number: int, making: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return, of what :meth:`making` returned, the matrices without products from elsewhere."""
        if number:
            return dict(making)
        return {
            o: mask & ~self._begun[o] if o in self._begun else mask for o, mask in making.items()
        }

    def may_follow(self, number: int, operand: int) -> Tensor:
        """Return the matrices that may make another iteration after ``number``, uint8."""
        if number + 1 < self._rounds[operand]:
            return self._at_most[number + 1, operand]
        return torch.zeros_like(self._at_most[number, operand])

    @cached_property
    def _at_most(self) -> Tensor:  # (iterations, operands, matrices): what may be made
        return (self.most > self._numbers).byte()

    @cached_property
    def _at_least(self) -> Tensor:  # likewise: what is made whatever it gains
        return (self.least > self._numbers).byte()

    @cached_property
    def _numbers(self) -> Tensor:
        return torch.arange(self.count, device=self.most.device).view(-1, 1, 1)
