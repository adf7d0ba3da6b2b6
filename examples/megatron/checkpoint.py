"""Checkpoints: one folder per step, in Megatron's distributed format.

A run may resume on more or fewer replicas.
"""

from __future__ import annotations

import pickle
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from recipe import Recipe

# How the distributed optimizer writes: each rank what it holds. megatron-core 0.14 has an older
# format for that.
RESHARDABLE = hasattr(DistributedOptimizer, "sharded_param_state_dp_reshardable")
SHARDING = "dp_reshardable" if RESHARDABLE else "fully_sharded_model_space"
METADATA = {"distrib_optim_sharding_type": SHARDING}

#: What torch's distributed checkpoints keep their index in, the file ``.metadata``.
RECORDS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def check_support(recipe: Recipe) -> None:
    """Refuses to start a run that could not be saved or resumed."""
    if find_spec("psutil") is None:
        raise ValueError(
            "--save takes psutil, got no such module: Megatron's checkpoint writers hang without it"
        )
    if recipe.distributed_optimizer and not (RESHARDABLE or HAVE_APEX_OR_TE):
        raise ValueError(
            "--save and --load take distributed_optimizer false on megatron-core 0.14 without "
            "Transformer Engine and Apex, got true"
        )


def newest(folder: Path) -> Path:
    """The checkpoint of the last step under `folder` that was written to its end."""
    steps = {
        int(match[1]): path
        for path in folder.glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name))
        and dist_checkpointing.check_is_distributed_checkpoint(str(path))
    }
    if not steps:
        raise ValueError(
            f"--load takes a folder that --save wrote, got {folder}, which has no checkpoint"
        )
    return steps[max(steps)]


def save(
    folder: Path,
    step: int,
    gpt: GPTModel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Writes everything that the steps after `step` depend on."""
    path = folder / f"step_{step}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(_state(gpt, optimizer, scheduler, is_loading=False), str(path))


class _Index(pickle.Unpickler):
    """Reads an index, and nothing else: torch itself would run whatever a pickle can hold."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        if is_dtype or name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}, which could run code")


def check(path: Path) -> None:
    """Refuses a checkpoint whose index would run code.

    torch loads the other files with weights_only.
    """
    index = path / ".metadata"
    if index.is_file():
        try:
            with index.open("rb") as file:
                _Index(file).load()
        except Exception as error:  # of a damaged pickle, any
            raise ValueError(f"--load takes torch's own records in {index}, got {error}") from None


@torch.no_grad()
def load(
    path: Path, gpt: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> int:
    """Puts a checkpoint into the model, the optimizer and the schedule; returns their steps."""
    check(path)
    step = int(path.name.removeprefix("step_"))
    _allocate(optimizer)
    state = dist_checkpointing.load(_state(gpt, optimizer, scheduler, is_loading=True), str(path))
    gpt.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _count(optimizer, step)
    scheduler.load_state_dict(state["scheduler"])
    return step


def _allocate(optimizer: MegatronOptimizer) -> None:
    # Without Transformer Engine and Apex, Megatron loads only into moments that are there: a step
    # of rate 0 makes them.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.zero_grad()
    optimizer.step()


def _count(optimizer: MegatronOptimizer, step: int) -> None:
    # There Megatron also loads one count into all moments, in which each parameter's next step
    # would add one.
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for moments in inner.optimizer.state.values():
            if "step" in moments:
                moments["step"] = torch.full_like(moments["step"], step)


def _state(
    gpt: GPTModel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    is_loading: bool,
) -> dict[str, Any]:
    model = gpt.sharded_state_dict()
    return {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA),
        "scheduler": scheduler.state_dict(),
    }
