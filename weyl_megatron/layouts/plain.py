"""Plain torch and DDP: every parameter whole on every rank, each a buffer of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .buffers import Bands, Buffer, Parameter, Shard, Spread
from .fused import Fused
from .grid import Box
from .kinds import Kind
from .local import is_on_mesh, local
from .tensor_parallel import Sharding, band_of

#: Of torch's fused AdamW, the only one that says it; who catches that finds it in ours.
_FUSED_ON_META = (
    "`fused=True` requires all the params to be floating point Tensors of supported devices"
)


def plain_buffer(
    tensor: Tensor,
    name: str,
    shardings: Mapping[int, Sharding],
    kind: Kind | None = None,
    fused: Fused | None = None,
) -> Buffer:
    """Return the buffer of one parameter that the optimizer steps as it is; ``kind`` is what it is
    to its module, ``fused`` what an engine knows of its parts.

    Raises:
        ValueError: the parameter's storage is not understood (FSDP1, sparse, complex, overlapping).
        RuntimeError: it is on the meta device, as torch's fused AdamW raises.
    """
    if reason := why_foreign(tensor):
        kind_of_error = RuntimeError if tensor.is_meta else ValueError
        raise kind_of_error(f"AdamW2: parameter '{name}' {reason}.")
    order = None if tensor.is_contiguous() or not is_dense(tensor) else tuple(storage_order(tensor))
    sharding, frozen = shardings.get(id(tensor)), is_frozen(tensor)
    parameter = band_of(
        name, tensor.shape, sharding, kind=kind, order=order, is_frozen=frozen, fused=fused
    )
    return Buffer(tensor, (Shard(parameter, 0, tensor.numel(), 0),))


def mesh_buffer(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    box: Box,
    spreads: tuple[Spread, ...],
    bands: Bands | None = None,
    kind: Kind | None = None,
) -> Buffer:
    """Return the buffer of a DTensor: the box that this rank has of it.

    Args:
        tensor: the parameter.
        name: its name.
        shape: of the whole.
        box: where this rank's piece lies.
        spreads: the groups that it is spread over.
        bands: where each rank has its shares of a fused weight's parts.
        kind: what it is to its module.

    Raises:
        ValueError: the storage of the piece is not understood.
    """
    held = local(tensor)
    if reason := why_foreign(held):
        raise ValueError(f"AdamW2: parameter '{name}' {reason}.")
    # What has gaps, as columns that torch 2.5 cuts out, is stepped as a dense copy.
    if storage_order(held) != list(range(held.dim())):
        raise ValueError(
            f"AdamW2: parameter '{name}' is a DTensor whose piece on this rank has its dimensions "
            "in another order in memory, it takes row after row."
        )
    parameter = Parameter(name, shape, box, spreads, bands, kind=kind, is_frozen=is_frozen(tensor))
    return Buffer(tensor, (Shard(parameter, 0, held.numel(), 0),))


def is_frozen(tensor: Tensor) -> bool:
    """Whether a parameter of a group is not stepped."""
    return not tensor.requires_grad and tensor.grad is None


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor whose elements fill a range of memory, in any order: itself, or else a
    contiguous copy.
    """
    return (
        tensor if is_dense(tensor) else tensor.detach().clone(memory_format=torch.contiguous_format)
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a range of memory, in any order of dimensions."""
    return tensor.is_contiguous() or tensor.permute(storage_order(tensor)).is_contiguous()


def storage_order(tensor: Tensor) -> list[int]:
    """Return the dimensions in the order in which they lie in memory, the slowest first.

    The order of equal strides is kept, so a contiguous tensor's is 0, 1, 2, …
    """
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a tensor wraps others, and has a storage without an address itself.

    Of one whose storage was freed the size is 0.
    """
    return tensor.data_ptr() == 0 and tensor.numel() > 0 and tensor.untyped_storage().nbytes() > 0


def why_foreign(tensor: Tensor) -> str | None:
    """Return why a parameter cannot be stepped as it is, as the end of a sentence; None: it can."""
    if is_on_mesh(tensor):
        return why_foreign(local(tensor))
    kinds = {base.__name__ for base in type(tensor).__mro__}
    if "FlatParameter" in kinds or getattr(tensor, "_fsdp_flattened", False):
        return "is flattened by FSDP1, whose layout AdamW2 does not understand"
    if tensor.is_complex() or tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"is {tensor.dtype}, {tensor.layout}; it takes dense real floats"
    if tensor.is_meta:
        return (
            f"is on the meta device, it takes one with memory (torch.optim.AdamW: {_FUSED_ON_META})"
        )
    if lacks_memory(tensor):
        return (
            f"is a {type(tensor).__name__}, whose memory other tensors have; it takes a plain one"
        )
    if any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        return "has elements that share memory (expand), it takes one without (.contiguous())"
    return None
