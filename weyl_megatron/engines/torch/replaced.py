"""Parameters that a model no longer has: ``fully_shard`` and ``parallelize_module`` put others in
their places.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from ...layouts.local import is_on_mesh


def refuse_replaced(whole: Sequence[tuple[str, Tensor]], tensors: Sequence[Tensor]) -> None:
    """Raise ValueError where a parameter was replaced by a DTensor after the optimizer was made.

    It would be stepped for ever without a gradient, and the model would not move. All that tells is
    that the DTensor, of the same shape, has the gradient that the parameter lacks.

    Args:
        whole: (name, parameter), of those that are plain tensors.
        tensors: all that are stepped.
    """
    idle = {
        tuple(tensor.shape): name
        for name, tensor in whole
        if tensor.requires_grad and tensor.grad is None
    }
    if not idle or not dist.is_available() or not dist.is_initialized():
        return
    held = {id(tensor) for tensor in tensors}
    for other in gc.get_objects():
        if (
            issubclass(type(other), Tensor)  # isinstance would ask proxies, which import modules
            and is_on_mesh(other)
            and isinstance(other, nn.Parameter)
            and id(other) not in held
            and other.grad is not None
            and tuple(other.shape) in idle
        ):
            raise ValueError(
                f"AdamW2: parameter '{idle[tuple(other.shape)]}' got no gradient, and a DTensor of "
                "its shape that is not among the optimizer's has one; it takes the parameters that "
                "fully_shard and parallelize_module leave in the model: make AdamW2 after them."
            )
