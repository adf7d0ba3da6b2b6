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
    """G, M and V of one tensor, laid out in memory as it is."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Hyper


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.detach().permute(order).view(-1)
