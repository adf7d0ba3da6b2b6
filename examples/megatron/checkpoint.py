"""Checkpoints: one folder per step, in Megatron's distributed format, so that a run may resume on other ranks."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def check_writer() -> None:
    """Refuses to start a run that could not be saved."""
    if find_spec("psutil") is None:
        raise ValueError("--save takes psutil, got no such module: Megatron's checkpoint writers hang without it")


def newest(folder: Path) -> Path:
    """The checkpoint of the last step under `folder` that was written to its end."""
    found = {
        int(match[1]): path
        for path in folder.glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name))
        and dist_checkpointing.check_is_distributed_checkpoint(str(path))
    }
    if not found:
        raise ValueError(f"--load takes a folder that --save wrote, got {folder}, which has no checkpoint")
    return found[max(found)]


def save(
    folder: Path, step: int, gpt: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> None:
    """Writes everything that the steps after `step` depend on."""
    path = folder / f"step_{step}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(_state(step, gpt, optimizer, scheduler, is_loading=False), str(path))


def load(path: Path, gpt: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> int:
    """Puts a checkpoint into the model, the optimizer and the schedule, and returns how many steps they have made."""
    state = dist_checkpointing.load(_state(0, gpt, optimizer, scheduler, is_loading=True), str(path))
    gpt.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def _state(
    step: int, gpt: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, is_loading: bool
) -> dict[str, Any]:
    model = gpt.sharded_state_dict()
    return {
        "step": step,
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading),
        "scheduler": scheduler.state_dict(),
    }
