"""Plain torch and DDP: every parameter whole on every rank, each a buffer of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weyl_megatron.layouts.buffers import Buffer, Parameter, Shard
from weyl_megatron.layouts.grid import Sharding


def plain_buffer(tensor: Tensor, name: str, shardings: Mapping[int, Sharding]) -> Buffer:
    """Return the buffer of one parameter that the optimizer steps as it is.

    Raises:
        ValueError: the parameter's storage is not understood (FSDP, DTensor, sparse, complex, overlapping).
    """
    _reject_foreign(tensor, name)
    physical = tensor.permute(storage_order(tensor))
    if not physical.is_contiguous():
        raise ValueError(f"AdamW2: parameter '{name}' is not dense in memory; it takes one that is (.contiguous()).")
    parameter = Parameter(name, tuple(physical.shape), shardings.get(id(tensor)))
    return Buffer(tensor, (Shard(parameter, 0, tensor.numel(), 0),))


def storage_order(tensor: Tensor) -> list[int]:
    """Return the dimensions in the order in which they lie in memory, the slowest first.

    A channels-last convolution (out, kernel, in) has the same singular values as (out, in, kernel): its columns are
    only permuted. The order of equal strides is kept, so a contiguous tensor's is 0, 1, 2, …
    """
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)


def _reject_foreign(tensor: Tensor, name: str) -> None:
    """Raise one sentence for a parameter that an engine has cut up in a way that is not understood here."""
    kinds = {base.__name__ for base in type(tensor).__mro__}
    if "FlatParameter" in kinds or getattr(tensor, "_fsdp_flattened", False):
        raise ValueError(f"AdamW2: parameter '{name}' is flattened by FSDP1, whose layout AdamW2 does not understand.")
    if "DTensor" in kinds:
        raise ValueError(
            f"AdamW2: parameter '{name}' is a DTensor (FSDP2 or torch tensor parallelism), whose layout AdamW2 does "
            f"not understand."
        )
    if tensor.is_complex() or tensor.is_sparse or not tensor.is_floating_point():
        raise ValueError(f"AdamW2: parameter '{name}' is {tensor.dtype}, {tensor.layout}; it takes dense real floats.")
