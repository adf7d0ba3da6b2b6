"""torchrun worker: stacks of experts that ranks share out by an expert mesh dimension, and FSDP2
once more, step as they do on one process.

    torchrun --nproc_per_node=4 tests/engines/torch/experts_worker.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests import tolerances
from tests.engines.torch.meshes import whole
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

STEPS, EXPERTS, ROWS, COLS = 10, 5, 7, 9  # 5 experts on 2 ranks: 3 and 2; 7 rows: 4 and 3
TOLERANCE = 1e-6  # relative: all gradients are the same

NAMES = ("layers.0.moe.experts.w1", "layers.0.moe.experts.w2", "layers.0.moe.router.gate.weight")
SHAPES = ((EXPERTS, ROWS, COLS), (EXPERTS, COLS, ROWS), (EXPERTS, COLS))


def drawn(number: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(SHAPES[number], generator=generator) * 0.3


def spread(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    return distribute_tensor(tensor, mesh, placements)


def from_local(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """What a model does that makes only its own experts."""
    local = distribute_tensor(tensor, mesh, placements).to_local().clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def check(
    name: str, mesh: DeviceMesh, placements: Sequence[Any], make: Any, **options: Any
) -> None:
    alone = [nn.Parameter(drawn(number, 0)) for number in range(len(SHAPES))]
    kept = [Replicate()] * mesh.ndim  # the router is on every rank
    places = [placements, placements, kept]
    cut = [
        nn.Parameter(make(param.detach().clone(), mesh, place))
        for param, place in zip(alone, places, strict=True)
    ]
    given = {"tau": 0.003, "io": [], **options}
    optimizers = [
        AdamW2(list(zip(NAMES, params, strict=True)), lr=3e-2, weight_decay=0.1, **given)
        for params in (alone, cut)
    ]
    for step in range(1, STEPS + 1):
        for number, (param, piece) in enumerate(zip(alone, cut, strict=True)):
            param.grad = drawn(number, step)
            piece.grad = make(drawn(number, step), mesh, places[number])
        for optimizer in optimizers:
            optimizer.step()
    distance = max(
        float((whole(piece) - expected.detach()).norm() / expected.detach().norm())
        for piece, expected in zip(cut, alone, strict=True)
    )
    entries, expected_entries = optimizers[1].stats(), optimizers[0].stats()
    assert list(entries) == list(expected_entries)
    assert f"{NAMES[0]}[{EXPERTS - 1}]" in entries
    clipped = sum(entry.clipped for entry in entries.values())
    if dist.get_rank() == 0:
        print(f"{name}: {distance:.1e}, {clipped} of {len(entries)} clipped", flush=True)
    assert distance <= TOLERANCE, (name, distance)
    assert clipped > 1


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ep", "fsdp"))
    with tolerances.every_iteration():
        check("Shard(0)", flat, [Shard(0)], spread)
        check("Shard(0), own experts", square, [Shard(0), Replicate()], from_local)
        check("Shard(0) and Shard(1)", square, [Shard(0), Shard(1)], spread)
        check("Shard(0) and Shard(1), own", square, [Shard(0), Shard(1)], from_local)
        check("Shard(0) and Shard(2)", square, [Shard(0), Shard(2)], spread)
        check("Shard(0) twice", square, [Shard(0), Shard(0)], spread)
        check("projected", square, [Shard(0), Shard(1)], spread, clip="project")
        check("balanced", square, [Shard(0), Shard(1)], spread, tau="balanced")
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
