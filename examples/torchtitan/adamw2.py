"""torchtitan trains with AdamW²: its own trainer, models, data and checkpoints.

    PYTHONPATH=examples/torchtitan torchrun --nproc_per_node=8 -m torchtitan.train \\
        --module adamw2 --config llama3_debugmodel

One line of a configuration changes: ``optimizer=default_adamw(lr=8e-4)`` becomes
``optimizer=adamw2(lr=8e-4, tau="balanced")``. Written for torchtitan 0.3.0, whose container of
optimizers looks up classes in a fixed list; docs/torchtitan.md says what was run.

Under a pipeline torchtitan makes an AdamW2 for every stage, and none knows how many matrices the
others have: τ takes a number there (docs/pipelining.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

from weyl_megatron import AdamW2


class AdamW2Container(OptimizersContainer[Any]):
    """torchtitan's container, with one name more in its list."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        implementation: str = "for-loop"  # AdamW2 has kernels of its own

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == "AdamW2":
            return AdamW2
        return OptimizersContainer._resolve_optimizer_factory(name)


def adamw2(
    lr: float = 8e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    **options: Any,
) -> AdamW2Container.Config:
    """Return what goes in the place of ``default_adamw(…)``.

    Args:
        lr, betas, weight_decay: as there; the scheduler's warmup is not needed.
        options: other options of AdamW2: ``tau``, ``overrides``, ``nonfinite``, ….
    """
    group = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    return AdamW2Container.Config(
        param_groups=[
            ParamGroupConfig(pattern=r".*", optimizer_name="AdamW2", optimizer_kwargs=group)
        ],
        optimizer_factory_kwargs_by_name={"AdamW2": options},
    )


def llama3_debugmodel() -> Trainer.Config:
    config = config_registry.llama3_debugmodel()
    config.optimizer = adamw2(lr=8e-4, tau="balanced")
    config.lr_scheduler.warmup_steps = 0
    return config
