"""Memory that tells: a tensor between two fences of NaN, which a step must neither read nor
write.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements on either side; an odd number, so that what lies between is not aligned either.
WIDTH = 33


class Fences:
    """All tensors that were copied between fences, for as long as the day lasts."""

    def __init__(self) -> None:
        self._sides: list[Tensor] = []
        self._inside: set[int] = set()

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of the same strides between fences; what is no dense float in memory stays
        where it is.
        """
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or not tensor.is_floating_point()
        ):
            return tensor
        extent = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        extent = extent + 1 if tensor.numel() else 0
        whole = torch.full((WIDTH + extent + WIDTH,), float("nan"), dtype=tensor.dtype)
        self._sides += [whole[:WIDTH], whole[WIDTH + extent :]]
        copied = whole.as_strided(tensor.shape, tensor.stride(), WIDTH)
        self._inside.add(copied.data_ptr())
        if tensor.numel():  # of what is expanded, each number is written once
            ones = [
                1 if stride == 0 else size
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            ]
            narrow = tensor.detach().as_strided(ones, tensor.stride())
            copied.as_strided(ones, copied.stride()).copy_(narrow)
        return copied

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is such a copy."""
        return tensor.data_ptr() in self._inside

    def are_whole(self) -> bool:
        """Whether nothing was written outside of a copy."""
        return not self._sides or bool(
            torch.cat([side.float() for side in self._sides]).isnan().all()
        )
