"""What this rank holds of a tensor that torch spreads over a mesh of ranks (DTensor).

A plain tensor is held whole. Local tensors are asked for anew in every step: engines exchange them
behind a parameter that stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def is_on_mesh(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; ``torch.distributed.tensor`` need not be imported."""
    return hasattr(type(tensor), "to_local")


def remembered(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Return a reference to a tensor, that does not keep a plain one alive.

    A DTensor it does: ``Module.to`` puts other content into DTensors, by
    ``torch.utils.swap_tensors``, which refuses a tensor that has a weak reference.
    """
    return (lambda: tensor) if is_on_mesh(tensor) else weakref.ref(tensor)


def specification(tensor: Tensor) -> Any:
    """Return what has the mesh, the placements and the whole shape of a tensor of which a rank
    holds a piece; None: it is whole.

    A DTensor has them itself. DDP over a dimension of a mesh puts the pieces of tensor-parallel
    DTensors into the model as plain parameters, and notes there of what.
    """
    return tensor if is_on_mesh(tensor) else getattr(tensor, "_st_info", None)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module, or on one in it.

    Their classes tell, not their parameters: these are plain and whole while a module computes,
    and the root's until backward ends.
    """
    kinds = {kind for inner in module.modules() for kind in type(inner).__mro__}
    return any(kind.__name__ == "FSDPModule" for kind in kinds)


def local(tensor: Any) -> Any:
    """Return what this rank holds of a tensor; whatever is no DTensor comes back as it is.

    Without gradients this is the DTensor's own memory, also where that is in a wrapper, as weights
    are that FSDP2 gathers in float8.
    """
    if not is_on_mesh(tensor):
        return tensor
    held = tensor.to_local()
    held = held.wait() if hasattr(held, "wait") else held  # of a collective under way
    while hasattr(held, "__tensor_flatten__"):
        names, _ = held.__tensor_flatten__()
        content = getattr(held, names[0])
        if len(names) > 1 or (content.shape, content.dtype) != (held.shape, held.dtype):
            break
        held = content
    return held


def laid_like(tensor: Any, held: Tensor) -> Any:
    """Return a DTensor that is spread as another one, of what this rank holds of it; with a
    gradient.
    """
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        held,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def local_gradient(tensor: Tensor) -> Tensor | None:
    """Return the gradient of what this rank holds of a tensor; None: there is none.

    Collective where it is spread in another way than its parameter, as tensor parallelism leaves an
    embedding's.
    """
    grad: Any = tensor.grad
    if grad is not None and is_on_mesh(tensor) and is_on_mesh(grad):
        parameter: Any = tensor
        if grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)
    held: Tensor | None = local(grad)
    return held


def placements_of(tensors: Sequence[Any]) -> list[Any]:
    """Return how each tensor is spread; None: it is a plain one."""
    return [getattr(tensor, "placements", None) for tensor in tensors]
