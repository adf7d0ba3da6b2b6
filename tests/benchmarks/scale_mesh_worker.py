"""torchrun worker, 4 ranks: what benchmarks/scale.py counts of FSDP2 and HSDP, counted on real
DTensors, sums and steps.

Rank 0 writes what it counted to a file in the folder that is named.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.scale_count import CLIPS, OPTIONS, vectors_of
from tests.benchmarks.scale_worker import MODEL, RATES
from tests.fsdp2 import fully_shard
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown


def sharded(mesh: DeviceMesh) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters, as fully_shard makes them, under their own names."""
    torch.manual_seed(0)
    weights = MODEL.stage(0, 1)
    module = nn.ParameterList(torch.randn(weight.shape) for weight in weights)
    holder = nn.Sequential()
    holder.add_module("weights", module)
    fully_shard(holder, mesh=mesh)
    # Split in q, k and v by its name, as the stand-in is by its heads.
    names = (weight.name.replace("linear_qkv", "qkv") for weight in weights)
    return list(zip(names, holder.parameters(), strict=True))


def count(mesh: DeviceMesh, state: str, clip: str) -> list[int]:
    """Return collectives, bytes and bytes of vectors of the second of two steps."""
    named = sharded(mesh)
    io = [name for name, _ in named if name.startswith("embedding")]
    optimizer = AdamW2(named, lr=RATES[state], clip=clip, io=io, **OPTIONS)
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, **options: object) -> object:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, **options)

    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for _, param in named:
            whole = torch.randn(param.shape, generator=generator)
            assert isinstance(param, DTensor)
            size = mesh.size(mesh.ndim - 1)
            chunks = whole.chunk(size)
            place = mesh.get_local_rank(mesh.ndim - 1)
            held = chunks[place] if place < len(chunks) else whole[:0]
            param.grad = DTensor.from_local(
                held.contiguous(),
                mesh,
                param.placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        sent.clear()
        with patch.object(dist, "all_reduce", counted):
            optimizer.step()
    assert {entry.certified for entry in optimizer.stats().values()} == {state == "certified"}
    (matrix_group,) = optimizer._matrix_groups
    return [len(sent), sum(sent), vectors_of(matrix_group)]


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    meshes = {
        "fsdp": init_device_mesh("cpu", (4,)),
        "hsdp2": init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "dp")),
    }
    counts = {
        name: {clip: {state: count(mesh, state, clip) for state in RATES} for clip in CLIPS}
        for name, mesh in meshes.items()
    }
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "counts.json").write_text(json.dumps(counts))
    shutdown()


if __name__ == "__main__":
    main()
