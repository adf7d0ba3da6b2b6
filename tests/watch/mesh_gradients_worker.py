"""torchrun worker: watches two steps of plain torch's AdamW and one of AdamW², and what the
gradients of the first were.

Usage: mesh_gradients_worker.py OUT_DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from tests.fsdp2 import fully_shard, lacking
from tests.watch import plain_adamw
from tests.watch.plain_adamw import MODELS, exact_norms, gradients_of, loss_of
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch.watch import Watch


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer.h
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def columns(model: nn.Module) -> nn.Module:
    """FSDP2 that cuts matrices along their second dimension."""
    return fsdp(model, shard_placement_fn=lambda param: Shard(param.dim() - 1))


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return fsdp(model, mesh=mesh)


CASES: dict[int, dict[str, Callable[[nn.Module], nn.Module]]] = {
    1: {"whole": lambda model: model},
    2: {"ddp": DistributedDataParallel, "fsdp": fsdp, "columns": columns},
    4: {"hsdp": hsdp},
}


def measured(model: nn.Module, kind: str) -> dict[str, Any]:
    optimizer = plain_adamw.made(kind, list(model.named_parameters()))
    watch = Watch(model, optimizer, every=1)
    exact: list[dict[str, float]] = []

    def step(loss: Tensor) -> None:
        loss.backward()
        if dist.get_world_size() == 1:
            exact.append(exact_norms(gradients_of(model)))
        optimizer.step()
        optimizer.zero_grad()

    steps = plain_adamw.steps(watch, lambda tokens: loss_of(model, tokens), step)
    return {"steps": steps, "exact": exact, "hooks": len(optimizer._optimizer_step_pre_hooks)}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, spread in CASES[dist.get_world_size()].items():
        if spread is columns and lacking("shard_placement_fn"):
            continue
        for which, make in MODELS.items():
            for kind in ("adamw", "adamw2"):
                run = measured(spread(make()), kind)
                if dist.get_rank() == 0:
                    (folder / f"{name}-{which}-{kind}.json").write_text(json.dumps(run))
    shutdown()


if __name__ == "__main__":
    main()
