"""Which parameters are bands of a larger matrix under tensor parallelism: Megatron-style
attributes, and AutoTP's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from .grid import Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Which dimension of the weight AutoTP's layers of releases without per-parameter metadata split.
_AUTOTP_DIM = {"LinearLayer": 0, "LinearAllreduce": 1}


def shardings_of(
    named: Sequence[tuple[str, Tensor]],
    group: ProcessGroup | None,
    owners: dict[int, str] | None = None,
) -> dict[int, Sharding]:
    """Return the sharding of every parameter, by ``id``; empty where there is no tensor
    parallelism.

    A parameter is split where ``param.tensor_model_parallel`` is true (Megatron, DeepSpeed AutoTP),
    along ``param.partition_dim`` or AutoTP's own metadata. Collective over ``group``: its ranks
    compare their extents.

    Args:
        named: (name, parameter), the same names in the same order on every rank of the group.
        group: the tensor-parallel process group, or None where there is none.
        owners: class name of the module that owns a parameter, by ``id``; tells AutoTP's layers
            apart.

    Raises:
        ValueError: a parameter says it is split and the group or the dimension is not known.
    """
    split: list[tuple[str, Tensor, int]] = []
    for name, param in named:
        if getattr(param, "tensor_model_parallel", False):
            dim = _partition_dim(param, (owners or {}).get(id(param)))
            if dim is None:
                if len(_shape(param)) < 2:  # AutoTP marks replicated biases too
                    continue
                raise ValueError(
                    f"AdamW2: parameter '{name}' is tensor-parallel, but which dimension is split "
                    "is not known."
                )
            split.append((name, param, dim))
    if group is None:
        if split:
            raise ValueError(
                f"AdamW2: parameter '{split[0][0]}' is tensor-parallel, but no tensor-parallel "
                "group is known."
            )
        return {}
    world = dist.get_world_size(group)
    if world == 1:
        return {}
    mine = {name: _shape(param)[dim] for name, param, dim in split}
    everyone: list[dict[str, int]] = [{} for _ in range(world)]
    dist.all_gather_object(everyone, mine, group=group)
    rank = dist.get_rank(group)
    shardings = {id(param): Sharding(group, None, (), rank) for _, param in named}
    for name, param, dim in split:
        shardings[id(param)] = Sharding(
            group, dim, tuple(extents[name] for extents in everyone), rank
        )
    return shardings


def _shape(param: Tensor) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


def _partition_dim(param: Any, owner: str | None) -> int | None:
    dim = getattr(param, "partition_dim", None)
    if dim is not None and dim >= 0:
        return int(dim)
    meta = getattr(param, "ds_autotp_universal_checkpoint_meta", None)
    if meta:
        return None if meta["partition_dim"] is None else int(meta["partition_dim"])
    return _AUTOTP_DIM.get(owner or "") if len(_shape(param)) > 1 else None
