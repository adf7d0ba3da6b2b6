"""Which parameters are bands of a larger matrix under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .buffers import Bands, Parameter, Spread
from .grid import Box

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding(NamedTuple):
    """Tensor parallelism of one parameter: every rank of ``group`` has a band of it."""

    group: ProcessGroup
    dim: int | None  # that is cut into bands; None: every rank has the whole parameter
    sizes: tuple[int, ...]  # the local extent along ``dim`` on every rank of the group
    rank: int


def band_of(name: str, shape: Sequence[int], sharding: Sharding | None, **known: Any) -> Parameter:
    """Return a parameter of which this rank has a band, or all.

    Args:
        name: of the parameter.
        shape: of the band.
        sharding: which it is; None: there is no tensor parallelism.
        known: other fields of :class:`.Parameter`; ``spreads`` are further ones.
    """
    if sharding is None:
        return Parameter(name, tuple(shape), **known)
    spread = Spread(sharding.group, sharding.rank, sharding.dim is None)
    known["spreads"] = (spread, *known.get("spreads", ()))
    if sharding.dim is None:
        return Parameter(name, tuple(shape), **known)
    whole, starts = list(shape), [0] * len(shape)
    whole[sharding.dim] = sum(sharding.sizes)
    starts[sharding.dim] = sum(sharding.sizes[: sharding.rank])
    box, bands = Box(tuple(starts), tuple(shape)), Bands(sharding.dim, sharding.sizes)
    return Parameter(name, tuple(whole), box, bands=bands, **known)


def marked_dim(param: Tensor) -> int | None:
    """Return ``param.partition_dim``, the dimension along which a parameter is split; None: it does
    not say.
    """
    dim = getattr(param, "partition_dim", None)
    return None if dim is None or dim < 0 else int(dim)


def shardings_of(
    named: Sequence[tuple[str, Tensor]],
    group: ProcessGroup | None,
    dim_of: Callable[[Tensor], int | None] = marked_dim,
    shape_of: Callable[[Tensor], Sequence[int]] = lambda param: param.shape,
) -> dict[int, Sharding]:
    """Return the sharding of every parameter, by ``id``; empty where there is no tensor
    parallelism.

    A parameter is split where ``param.tensor_model_parallel`` is true. Collective over ``group``:
    its ranks compare their extents.

    Args:
        named: (name, parameter), the same names in the same order on every rank of the group.
        group: the tensor-parallel process group, or None where there is none.
        dim_of: returns the dimension along which a parameter is split; None: it is not known.
        shape_of: returns a parameter's shape on this rank, where an engine took its elements out.

    Raises:
        ValueError: a parameter says it is split and the group or the dimension is not known.
    """
    split: list[tuple[str, Tensor, int]] = []
    for name, param in named:
        if getattr(param, "tensor_model_parallel", False):
            dim = dim_of(param)
            if dim is not None:
                split.append((name, param, dim))
            elif len(shape_of(param)) > 1:  # replicated biases are marked, too
                raise ValueError(
                    f"AdamW2: parameter '{name}' is tensor-parallel, but which dimension is split "
                    "is not known."
                )
    if group is None:
        if split:
            raise ValueError(
                f"AdamW2: parameter '{split[0][0]}' is tensor-parallel, but no tensor-parallel "
                "group is known."
            )
        return {}
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return {}
    extents = {name: shape_of(param)[dim] for name, param, dim in split}
    by_rank: list[dict[str, int]] = [{} for _ in range(world)]
    dist.all_gather_object(by_rank, extents, group=group)
    shardings = {id(param): Sharding(group, None, (), rank) for _, param in named}
    for name, param, dim in split:
        sizes = tuple(extents_there[name] for extents_there in by_rank)
        shardings[id(param)] = Sharding(group, dim, sizes, rank)
    return shardings
