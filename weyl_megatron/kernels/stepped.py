"""What a kernel is given of one tensor in one step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Hyper(NamedTuple):
    """The hyperparameters of one tensor's parameter group at step t."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float

    @property
    def correction1(self) -> float:
        """1 − β₁ᵗ."""
        return 1.0 - float(self.beta1**self.step)

    @property
    def correction2(self) -> float:
        """1 − β₂ᵗ."""
        return 1.0 - float(self.beta2**self.step)


class Stepped(NamedTuple):
    """G, M and V of one tensor, flat as they lie in memory."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Hyper
