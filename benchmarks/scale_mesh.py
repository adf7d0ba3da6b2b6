"""FSDP2 and HSDP for benchmarks/scale.py: what a rank steps, as AdamW2's engine for DTensors reads
it.

The DTensors are torch's, on meshes of the fake process group; the other ranks' extents, which the
engine asks for, are torch's chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.scale_models import Spread
from weyl_megatron.engines.torch.dtensor import placed
from weyl_megatron.layouts import plain
from weyl_megatron.layouts.buffers import Buffer, Parameter
from weyl_megatron.settings import PROJECT

#: FSDP2, and HSDP in shards on so many ranks.
MESHES = ("fsdp", "hsdp2", "hsdp8")


def is_refused(spread: str, state: str, clip: str) -> bool:
    """Whether AdamW2 refuses it: Triton's kernels do not project HSDP's copies."""
    return spread.startswith("hsdp") and clip == PROJECT and "GPU" in state


def _shards(spread: str, ranks: int) -> int:
    return int(spread[4:] or ranks)


@cache
def _extents(size: int, ranks: int) -> list[int]:
    """Return what each rank has of a dimension, as fully_shard cuts it."""
    chunks = torch.empty(size, device="meta").chunk(ranks)
    return [len(chunk) for chunk in chunks] + [0] * (ranks - len(chunks))


def mesh_pieces(
    shapes: Sequence[Sequence[int]], spread: Spread
) -> list[list[tuple[int, int, int]]]:
    """Return (rank, start, stop) of what ranks hold of every parameter.

    Raises:
        ValueError: the ranks are no such mesh.
    """
    shards = _shards(spread.zero, spread.dp)
    if spread.tp > 1 or spread.pp > 1 or spread.dp % shards:
        raise ValueError(
            f"--zero {spread.zero} takes --tp 1, --pp 1 and --dp that {shards} divides"
        )
    pieces = []
    for shape in shapes:
        extents, line = _extents(shape[0], shards), prod(shape[1:])
        stops = [rows * line for rows in accumulate(extents)]
        ranges = [(stop - n * line, stop) for stop, n in zip(stops, extents, strict=True)]
        held = [(rank, *ranges[rank % shards]) for rank in range(spread.dp)]
        pieces.append([piece for piece in held if piece[1] < piece[2]])
    return pieces


def mesh_buffers(
    parameters: Sequence[Parameter], spread: str, tensor_of: Callable[[int], Tensor]
) -> list[Buffer]:
    """Return what this rank of the fake process group steps, on a mesh of all its ranks.

    Args:
        parameters: whole.
        spread: one of ``MESHES``.
        tensor_of: makes a tensor of that length.
    """
    ranks, shards = dist.get_world_size(), _shards(spread, dist.get_world_size())
    if spread == "fsdp":
        mesh, placements = init_device_mesh("cpu", (shards,)), (Shard(0),)
    else:
        mesh = init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=("copies", "dp"))
        placements = (Replicate(), Shard(0))
    extents = [_extents(parameter.shape[0], shards) for parameter in parameters]
    place = dist.get_rank() % shards
    named = []
    for parameter, cut in zip(parameters, extents, strict=True):
        held = torch.empty(cut[place], *parameter.shape[1:], device="meta")
        tensor = DTensor.from_local(
            held,
            mesh,
            placements,
            run_check=False,
            shape=torch.Size(parameter.shape),
            stride=torch.empty(parameter.shape, device="meta").stride(),
        )
        named.append((parameter.name, torch.nn.Parameter(tensor)))

    def all_gather_object(by_rank: list[Any], own: Any, group: Any) -> None:
        by_rank[:] = [[(rank, cut[rank]) for cut in extents] for rank in range(shards)]
        assert by_rank[place] == own and dist.get_world_size(group) == shards

    with (
        patch.object(dist, "all_gather_object", all_gather_object),
        patch.object(plain, "why_foreign", lambda _: None),  # nothing is in these tensors
    ):
        places = placed(named)
        buffers = [plain.mesh_buffer(tensor, name, *places[id(tensor)]) for name, tensor in named]
    made = []
    for buffer, parameter in zip(buffers, parameters, strict=True):
        (shard,) = buffer.shards
        shard = shard._replace(parameter=shard.parameter._replace(fused=parameter.fused))
        made.append(replace(buffer, tensor=tensor_of(shard.stop), shards=(shard,)))
    return made
