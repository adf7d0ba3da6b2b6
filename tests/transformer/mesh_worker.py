"""torchrun worker: trains examples/collapse's GPT with σReparam and scaled residuals under FSDP2
and HSDP; writes losses, σ₁ and parameters, and what is refused.

Usage: mesh_worker.py OUT_DIR. One process trains the models whole; the global batch is the same at
any number of processes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from examples.collapse.model import GPT, GPTConfig
from tests.fsdp2 import fully_shard
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.transformer.reparam import fold, sigma_reparam, sigmas
from weyl_megatron.transformer.residual import scale_residuals

CONFIG = GPTConfig(norm="pre", vocabulary=50, context=16, layers=2, heads=2, width=24)
STEPS = 5

PREPARED: dict[str, Callable[[GPT], Any]] = {
    "reparam": lambda model: sigma_reparam(model, exclude=("head",)),
    "statistics": lambda model: sigma_reparam(model, exclude=("head",), statistics_only=True),
    "forward": lambda model: scale_residuals(model, mode="forward"),
    "init": lambda model: scale_residuals(model, mode="init"),
    "learned": lambda model: scale_residuals(model, mode="learned"),
}


def made() -> GPT:
    torch.manual_seed(3)
    return GPT(CONFIG)


def spread(model: GPT) -> GPT:
    """FSDP2 on 2 ranks, HSDP on 4."""
    world = dist.get_world_size()
    if world > 1:
        shape = {2: (2,), 4: (2, 2)}[world]
        names = ("replicas", "shards")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def trained(model: GPT) -> tuple[dict[str, Tensor], GPT]:
    optimizer = AdamW2(model.named_parameters(), lr=0.02, eps=1e-4)
    losses = []
    for step in range(STEPS):
        tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))
        tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total / dist.get_world_size())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return state | {"losses": torch.stack(losses)}, model


def said(act: Callable[[], Any]) -> str:
    try:
        return repr(act())
    except ValueError as error:
        return str(error)


def refusals(reparametrized: GPT) -> dict[str, str]:
    """What is said of a model that is spread already, also where its parameters look whole."""
    between = made()
    fully_shard(between)
    between(torch.zeros(1, 4, dtype=torch.long))
    return {
        "fold": said(lambda: fold(reparametrized)),
        "reparam": said(lambda: sigma_reparam(spread(made()))),
        "reparam between": said(lambda: sigma_reparam(between)),
        "init": said(lambda: scale_residuals(spread(made()), mode="init")),
        "learned": said(lambda: scale_residuals(between, mode="learned")),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    folder, results = Path(sys.argv[1]), dict[str, Any]()
    dist.init_process_group("gloo")
    for name, prepare in PREPARED.items():
        model = made()
        prepare(model)
        results[name], model = trained(spread(model))
        if name in ("reparam", "statistics"):
            results[name]["sigmas"] = torch.tensor(list(sigmas(model).values()))
        if name == "reparam" and dist.get_world_size() == 2:
            results["refused"] = refusals(model)
    late = spread(made())
    scale_residuals(late, mode="forward")
    results["late"], _ = trained(late)
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{dist.get_world_size()}.pt")
    shutdown()


if __name__ == "__main__":
    main()
