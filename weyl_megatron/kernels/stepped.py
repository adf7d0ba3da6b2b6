"""What a kernel is given of one tensor in one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from weyl_megatron.layouts.plain import storage_order


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
    return tensor.detach().permute(storage_order(tensor)).view(-1)


def check_tensors(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Raise ValueError where a compiled kernel, which goes by addresses, would read other numbers than it should."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device != device:
            raise ValueError(
                f"AdamW2: a gradient or state tensor is {tensor.dtype} on {tensor.device}, the kernel takes "
                f"torch.float32 on {device}, like its parameter."
            )
