"""One power step with one vector on a matrix that tensor parallelism may spread, and sums that
autograd understands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: A vector shorter than this is not divided by its length: the matrix is zero, or was left behind
#: by underflow.
_TINY = 1e-30


def power_step(
    matrix: Tensor, right: Tensor, group: ProcessGroup | None = None, dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the next singular vectors, this rank's part of each.

    They are u = Wv / ‖Wv‖ and v = Wᵀu / ‖Wᵀu‖.

    Collective over ``group``. A zero matrix leaves u zero and v as it was.

    Args:
        matrix: W, or this rank's band of it, ``(m, n)`` in float32 or float64.
        right: v, ``(n,)``.
        group: the ranks that hold the other bands.
        dim: 0 where the bands are rows, 1 where they are columns.
    """
    # Autocast would compute the products in half the digits.
    with torch.autocast(matrix.device.type, enabled=False):
        left = matrix @ right
        if dim == 1:
            left = total(left, group)
        left = left / _length(left, group if dim == 0 else None).clamp(min=_TINY)
        new = matrix.T @ left
        if dim == 0:
            new = total(new, group)
        length = _length(new, group if dim == 1 else None)
        return left, torch.where(length > _TINY, new / length.clamp(min=_TINY), right)


def total(vector: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum over a group; without gradients."""
    if group is None:
        return vector
    summed = vector.detach().clone()
    dist.all_reduce(summed, group=group)
    return summed


def _length(vector: Tensor, group: ProcessGroup | None) -> Tensor:
    return total(vector.square().sum(), group).sqrt()


class SumOverGroup(torch.autograd.Function):
    """Forward the sum of every rank's number; backward the gradient as it is: all ranks have the
    same.
    """

    @staticmethod
    def forward(_: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        return total(value, group)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class SharedByGroup(torch.autograd.Function):
    """Forward a number that all ranks have; backward the sum of their gradients: each rank uses it
    for its own band.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return total(gradients[0], ctx.group), None
