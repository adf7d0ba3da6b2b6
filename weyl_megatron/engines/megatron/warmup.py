"""Says where a schedule of Megatron still warms the rate up, which AdamW2 does without."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist

from ...environment import LOG
from ...optimizer import AdamW2
from ..on_import import when_imported, wrap
from .offload import CpuOffload


def look_at_schedules() -> None:
    """Have every ``OptimizerParamScheduler`` that is made around an AdamW2 looked at."""
    when_imported("megatron.core.optimizer_param_scheduler", _look)


def _look(module: ModuleType) -> None:
    def looking(make: Callable[..., None]) -> Callable[..., None]:
        def make_and_look(schedule: Any, *args: Any, **kwargs: Any) -> None:
            make(schedule, *args, **kwargs)
            if not (dist.is_initialized() and dist.get_rank()):
                _warn(schedule)

        return make_and_look

    wrap(module.OptimizerParamScheduler, "__init__", looking)


def _warn(schedule: Any) -> None:
    optimizer = schedule.optimizer
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    warmup, steps = schedule.lr_warmup_steps, schedule.lr_decay_steps
    if warmup > 0 and any(
        isinstance(getattr(wrapper, "optimizer", None), AdamW2 | CpuOffload) for wrapper in wrappers
    ):
        LOG.warning(
            "AdamW2: lr_warmup_steps got %s of %s steps of the schedule, it takes 0: a small tau "
            "acts like a warmup, and both together start slowly.",
            warmup,
            steps,
        )
