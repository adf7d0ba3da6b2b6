"""torchrun worker: watches three steps of examples/collapse's GPT that torch spreads over ranks
(FSDP2, HSDP; tensor parallelism is tp_worker.py's); writes the last measurement, and what is
refused.

Usage: mesh_worker.py OUT_DIR. One process watches the model whole; the global batch is the same at
any number of processes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from examples.collapse.model import GPT, GPTConfig
from tests.fsdp2 import MixedPrecisionPolicy, fully_shard
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.transformer.reparam import sigma_reparam
from weyl_megatron.watch.sharpness import sharpness
from weyl_megatron.watch.watch import Watch

CONFIG = GPTConfig(norm="pre", vocabulary=50, context=16, layers=3, heads=2, width=24)
STEPS = 3


def whole(_: GPT) -> None: ...


def fsdp(model: GPT, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def root_alone(model: GPT) -> None:
    fully_shard(model)


def hsdp(model: GPT) -> None:
    fsdp(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def half(model: GPT) -> None:
    fsdp(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def checkpointed(model: GPT) -> None:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    fsdp(model)


def converted(model: GPT) -> None:
    sigma_reparam(model, exclude=("head",))


def fsdp_converted(model: GPT) -> None:
    converted(model)
    fsdp(model)


CASES: dict[int, dict[str, Callable[[GPT], None]]] = {
    1: {"whole": whole, "whole converted": converted},
    2: {
        "fsdp": fsdp,
        "root": root_alone,
        "bf16": half,
        "checkpointed": checkpointed,
        "converted": fsdp_converted,
    },
    4: {"hsdp": hsdp},
}


def batch(step: int) -> Tensor:
    """This rank's part of the global batch."""
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def made(spread: Callable[[GPT], None]) -> GPT:
    torch.manual_seed(3)
    model = GPT(CONFIG)
    spread(model)
    return model


def measured(model: GPT, folder: Path) -> dict[str, float]:
    optimizer = AdamW2(model.named_parameters(), lr=0.02, eps=1e-4)
    watch = Watch(model, optimizer, every=1, maps=[0], out=folder)
    values: dict[str, float] = {}
    for step in range(STEPS):
        tokens = batch(step)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values = dict(watch.step(loss))
    watch.close()
    return values


def tp(model: GPT) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        plan = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
        parallelize_module(block, mesh, plan)


def part_of_ranks(model: GPT) -> None:
    fsdp(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"])


def sharpness_beside_bands(model: GPT) -> float:
    """Sharpness of parameters that are whole, in a model of which others are not."""
    tokens = batch(0)
    return sharpness(lambda: model(tokens[:, :-1], tokens[:, 1:]), [model.wte.weight])


def sharpness_of(model: GPT, *, is_between: bool) -> float:
    """Sharpness of DTensors, or of what is plain and whole between forward and backward."""
    tokens = batch(0)
    if is_between:
        model(tokens[:, :-1])
    parameters = list(model.parameters())
    return sharpness(lambda: model(tokens[:, :-1], tokens[:, 1:]), parameters)


#: By the number of ranks: what is refused.
REFUSED: dict[int, dict[str, Callable[[], Any]]] = {
    1: {},
    2: {
        "sharpness": lambda: sharpness_of(made(fsdp), is_between=False),
        "sharpness of bands": lambda: sharpness_of(made(tp), is_between=False),
        "sharpness beside bands": lambda: sharpness_beside_bands(made(tp)),
        "sharpness between": lambda: sharpness_of(made(root_alone), is_between=True),
    },
    4: {"part of ranks": lambda: Watch(made(part_of_ranks))},
}


def said(act: Callable[[], Any]) -> str:
    try:
        return repr(act())
    except ValueError as error:
        return str(error)


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, spread in CASES[dist.get_world_size()].items():
        values = measured(made(spread), folder / name)
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(values))
    refused = {name: said(act) for name, act in REFUSED[dist.get_world_size()].items()}
    if dist.get_rank() == 0:
        (folder / f"said{dist.get_world_size()}.txt").write_text(json.dumps(refused))
    shutdown()


if __name__ == "__main__":
    main()
