"""torchrun worker, 2 ranks: what a step launches where matrices are cut between them within a row,
as JSON by depth and state.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from benchmarks.models import MODELS
from tests.kernels.launches import counted, idle, settles
from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard


def main() -> None:
    dist.init_process_group("gloo")
    rank, everyone = dist.get_rank(), dist.group.WORLD
    assert everyone is not None
    steps = {}
    for depth in (12, 48):
        for name, stand in (("iterated", idle), ("sure", settles)):
            optimizer = _optimizer(depth, rank, everyone)
            steps[f"{name} {depth}"] = counted(optimizer, stand)._asdict()
    everything = [None, None]
    dist.all_gather_object(everything, steps)
    assert everything[0] == everything[1], everything
    if rank == 0:
        print("counts:" + json.dumps(steps))
    shutdown()


def _optimizer(depth: int, rank: int, everyone: dist.ProcessGroup) -> AdamW2:
    """Return one of a rank's share of all parameters, which lie one after the other."""
    shape = MODELS["gpt2-124m"]._replace(blocks=depth)
    shards = []
    at = 0
    for name, extents in shape.parameters():
        parameter = Parameter(name, tuple(max(1, extent // 64) for extent in extents))
        size = torch.Size(parameter.shape).numel()
        cut = size // 2 + 1
        start, stop = ((0, cut), (cut, size))[rank]
        shards.append(Shard(parameter, start, stop, at))
        at += stop - start
    tensor = torch.nn.Parameter(torch.ones(at))
    tensor.grad = torch.ones(at)
    optimizer = AdamW2([tensor], lr=1e-3)
    buffers = [Buffer(tensor, tuple(shards), (everyone,))]
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    return optimizer


if __name__ == "__main__":
    main()
