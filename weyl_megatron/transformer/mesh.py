"""What σReparam has to know of layers that torch's tensor parallelism has spread: their bands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_band(weight: Any) -> bool:
    """Whether a DTensor is what tensor parallelism makes of a matrix: rows, columns or copies."""
    placement = weight.placements[-1]
    is_plain = placement.is_shard() and getattr(placement, "split_factor", 1) == 1
    is_2d = weight.device_mesh.ndim == 1 and weight.dim() == 2
    return is_2d and (is_plain or placement.is_replicate())


def band_of(weight: Any) -> tuple[ProcessGroup | None, int | None]:
    """Return the group that shares a DTensor out, and the dimension that it is cut along."""
    placement = weight.placements[0]
    if not placement.is_shard() or weight.device_mesh.size() == 1:
        return None, None
    return weight.device_mesh.get_group(), placement.dim % weight.dim()


def first_of_band(weight: Any, group: ProcessGroup, dim: int) -> tuple[int, int]:
    """Return the first row (column) that this rank has, and how many all ranks have.

    The last ranks may have fewer than the others.
    """
    count = int(weight.shape[dim])
    share = -(-count // dist.get_world_size(group))
    return min(share * dist.get_rank(group), count), count


def cut_like(weight: Any, vector: Tensor, dim: int) -> Any:
    """Return a vector with an element for each row (column) of a DTensor, cut as these are.

    Checkpoints have all of what no rank has alone, then.
    """
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        vector,
        weight.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=weight.shape[dim : dim + 1],
        stride=(1,),
    )


def register_parameter(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """What parallelize_module calls to put a DTensor in the place of a weight.

    Of a converted layer torch would speak of a name with a dot.
    """
    if "." in name or (name == "weight" and parametrize.is_parametrized(layer, name)):
        raise ValueError(
            f"sigma_reparam: parallelize_module got a {type(layer).__name__} that is converted "
            "already, it takes plain layers: convert after parallelize_module and before "
            "fully_shard."
        )
    nn.Module.register_parameter(layer, name, param)
