"""Parameters that a model no longer has: ``fully_shard``, ``parallelize_module`` and DDP over a
dimension of a mesh put others in their places.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from ...environment import LOG
from ...layouts.local import is_on_mesh, specification


def refuse_replaced(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a parameter was replaced by a DTensor, or a DTensor by the piece of it
    that DDP sees, after the optimizer was made.

    It would be stepped for ever without a gradient, and the model would not move. All that tells is
    that the other, of the same shape, has the gradient that the parameter lacks. Of two DTensors
    the other may be a second optimizer's: where no parameter has a gradient, the log says it, and
    it is raised of those without memory.

    Args:
        named: (name, parameter), of all in the parameter groups.
    """
    idle = {
        (tuple(tensor.shape), is_on_mesh(tensor)): name
        for name, tensor in named
        if tensor.requires_grad and tensor.grad is None
    }
    if not idle or not dist.is_available() or not dist.is_initialized():
        return
    held = {id(tensor) for _, tensor in named}
    are_all_idle = all(tensor.grad is None for _, tensor in named)
    have_memory = not any(tensor.is_meta for _, tensor in named)
    for other in gc.get_objects():
        if not issubclass(type(other), Tensor):  # isinstance would ask proxies, which import
            continue
        whole = specification(other)
        if whole is None or not isinstance(other, nn.Parameter) or id(other) in held:
            continue
        shape = tuple(whole.shape)
        plain, spread = idle.get((shape, False)), idle.get((shape, True))
        is_sure = plain is not None or not is_on_mesh(other) or not have_memory
        name = plain or (spread if are_all_idle or not is_on_mesh(other) else None)
        if name is None or other.grad is None:
            continue
        sentence = (
            f"AdamW2: parameter '{name}' got no gradient, and a DTensor of its shape that is not "
            "among the optimizer's has one; it takes the parameters that fully_shard, "
            "parallelize_module, DDP and load_state_dict(assign=True) leave in the model: make "
            "AdamW2 after them."
        )
        if is_sure:
            raise ValueError(sentence)
        LOG.warning(sentence)
        return
