"""The runs: five DeepSpeed configurations that differ in optimizer and schedule alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

GLOBAL_BATCH = 8
PEAK_LR = 5e-3
END_LR = 0.1 * PEAK_LR
WARMUP = 0.65  # of all steps: the best mean over eight seeds of 0.5, 0.65 and 0.8


@dataclass(frozen=True)
class Run:
    """One run: its directory's name, what people call it, and how it differs from the others."""

    name: str
    title: str
    optimizer: dict[str, Any]
    warmup: bool = False


def _params(**more: Any) -> dict[str, Any]:
    # torch_adam: DeepSpeed's own AdamW is a kernel that compiles for minutes where there is no GPU.
    # AdamW² ignores it.
    return {"lr": PEAK_LR, "betas": [0.9, 0.95], "weight_decay": 0.1, **more, "torch_adam": True}


ADAMW_ALONE = Run("adamw", "AdamW, no warmup", {"type": "AdamW", "params": _params()})
ADAMW_WARMUP = Run(
    "adamw-warmup", "AdamW, warmup", {"type": "AdamW", "params": _params()}, warmup=True
)
ADAMW2 = Run("adamw2", "AdamW², τ = 0.01", {"type": "AdamW2", "params": _params(tau=0.01)})
ADAMW2_AUTO = Run(
    "adamw2-auto", "AdamW², τ = balanced", {"type": "AdamW2", "params": _params(tau="balanced")}
)
ADAMW2_PROJECT = Run(
    "adamw2-project",
    "AdamW², projected",
    {"type": "AdamW2", "params": _params(tau="balanced", clip="project")},
)

RUNS = (ADAMW_ALONE, ADAMW_WARMUP, ADAMW2, ADAMW2_AUTO, ADAMW2_PROJECT)


def warmup_steps(steps: int) -> int:
    """How many of a run's steps the baseline warms up for."""
    return max(1, round(WARMUP * steps))


def learning_rate(run: Run, step: int, steps: int) -> float:
    """The rate of `step`, counted from 0.

    A cosine from PEAK_LR to END_LR, behind a linear warmup if the run has one.
    """
    warmup = warmup_steps(steps) if run.warmup else 0
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return END_LR + (PEAK_LR - END_LR) * (1 + cosine) / 2


def schedule(run: Run, steps: int) -> Callable[[Optimizer], LambdaLR]:
    """What DeepSpeed takes as `lr_scheduler`; its own make their first step at rate 0."""
    return lambda optimizer: LambdaLR(
        optimizer, lambda step: learning_rate(run, step, steps) / PEAK_LR
    )


def deepspeed_config(run: Run, ranks: int, bf16: bool) -> dict[str, Any]:
    """The JSON configuration that DeepSpeed gets for `run`."""
    return {
        "train_micro_batch_size_per_gpu": sequences_per_rank(ranks),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": bf16},
        "optimizer": run.optimizer,
        "steps_per_print": 1_000_000_000,
    }


def sequences_per_rank(ranks: int) -> int:
    """The smallest micro batch with which `ranks` ranks make up GLOBAL_BATCH."""
    return -(-GLOBAL_BATCH // ranks)
