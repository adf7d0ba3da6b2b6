"""torchrun worker: trains examples/collapse's GPT with σReparam under torch's tensor parallelism,
alone and under FSDP2; writes losses, σ₁ and the whole state, and what is refused.

Usage: tp_worker.py OUT_DIR. One process trains the models whole; the global batch is the same at
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
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils.parametrize import is_parametrized

from examples.collapse.model import GPT
from tests.fsdp2 import fully_shard
from tests.watch.tp_models import MODELS, behind_gather, sequence, usual
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.transformer.reparam import fold, sigma_reparam, sigmas

STEPS = 5

#: How a model is spread, and options of σReparam.
CASES: dict[str, tuple[Callable[[GPT, DeviceMesh], None], dict[str, Any]]] = {
    "usual": (usual, {}),
    "sequence": (sequence, {"gamma": "sigma"}),
    "behind gather": (behind_gather, {}),
    "statistics": (usual, {"statistics_only": True}),
}


def made() -> GPT:
    torch.manual_seed(3)
    return MODELS["plain"]()


def spread(case: str) -> GPT:
    """Convert after tensor parallelism, on 2 ranks, and before FSDP2, on 2 × 2."""
    cut, options = CASES[case]
    world, model = dist.get_world_size(), made()
    mesh = init_device_mesh("cpu", (max(1, world // 2), 2), mesh_dim_names=("dp", "tp"))
    cut(model, mesh["tp"])
    sigma_reparam(model, exclude=("head",), **options)
    if world > 2:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def trained(model: GPT) -> dict[str, Tensor]:
    optimizer = AdamW2(model.named_parameters(), lr=0.02, eps=1e-4)
    losses = []
    for step in range(STEPS):
        tokens = torch.randint(50, (8, 13), generator=torch.Generator().manual_seed(step))
        parts = max(1, dist.get_world_size() // 2)
        tokens = tokens.chunk(parts)[dist.get_rank() // 2]
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total / dist.get_world_size())
    state = whole_state(model)
    return state | {"losses": torch.stack(losses), "sigmas": tracked(model)}


def whole_state(model: GPT) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def tracked(model: GPT) -> Tensor:
    return torch.tensor(list(sigmas(model).values()))


def goes_on(model: GPT, case: str, folder: Path) -> bool:
    """Whether a model that is spread afresh has all of it from a checkpoint of the ranks."""
    state = get_model_state_dict(model)
    checkpoint.save({"model": state}, checkpoint_id=folder)
    again = spread(case)
    fresh = get_model_state_dict(again)
    checkpoint.load({"model": fresh}, checkpoint_id=folder)
    set_model_state_dict(again, fresh)
    expected, loaded = whole_state(model), whole_state(again)
    return expected.keys() == loaded.keys() and all(
        torch.equal(loaded[name], value) for name, value in expected.items()
    )


def said(act: Callable[[], Any]) -> str:
    try:
        return repr(act())
    except ValueError as error:
        return str(error)


def converted_before() -> GPT:
    model = made()
    sigma_reparam(model, exclude=("head",))
    usual(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def main() -> None:
    warnings.simplefilter("ignore")
    folder, results = Path(sys.argv[1]), dict[str, Any]()
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    for case, (_, options) in CASES.items():
        if world == 1:
            model = made()
            sigma_reparam(model, exclude=("head",), **options)
        else:
            model = spread(case)
            weight: Any = model.blocks[0].attn.q.parametrizations.weight.original
            assert is_parametrized(model.blocks[0].attn.q) and weight.to_local().shape[0] < 24
        results[case] = trained(model)
        if world > 1:
            is_same = goes_on(model, case, folder / f"{case} on {world}")
            results[case]["goes on"] = torch.tensor(is_same)
    if world == 2:
        results["refused"] = {
            "before": said(converted_before),
            "fold": said(lambda: fold(spread("usual"))),
        }
    if dist.get_rank() == 0:
        torch.save(results, folder / f"{world}.pt")
    shutdown()


if __name__ == "__main__":
    main()
