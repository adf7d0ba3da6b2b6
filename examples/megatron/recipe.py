"""The recipe: every number of a run, read from YAML and checked before anything starts."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Where `examples` is, wherever this is started.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.keys import (
    BETAS,
    NOT_NEGATIVE,
    POSITIVE,
    SWITCH,
    TAU,
    choice,
    integer,
    key,
    pair,
    read,
)

_SPLIT = pair(
    "two weights above 0, of training and validation",
    lambda *parts: all(0 < x < math.inf for x in parts),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. The keys are those of the YAML file; `read_recipe` makes it."""

    num_layers: int = key(integer(1))
    hidden_size: int = key(integer(1))
    num_attention_heads: int = key(integer(1))
    seq_length: int = key(integer(1), 1024)

    optimizer: str = key(choice("adamw2", "adam"), "adamw2")
    tau: float | str = key(TAU, 0.01)
    lr: float = key(POSITIVE)
    min_lr: float = key(NOT_NEGATIVE, 0.0)
    lr_warmup_steps: int = key(integer(0), 0)
    betas: tuple[float, float] = key(BETAS, (0.9, 0.95))
    eps: float = key(POSITIVE, 1e-8)
    weight_decay: float = key(NOT_NEGATIVE, 0.1)
    clip_grad: float = key(NOT_NEGATIVE, 1.0)

    train_steps: int = key(integer(1))
    global_batch_size: int = key(integer(1))
    micro_batch_size: int = key(integer(1))
    split: tuple[float, float] = key(_SPLIT, (99.0, 1.0))
    dataloader_workers: int = key(integer(0), 2)
    seed: int = key(integer(0), 1234)

    tensor_parallel: int = key(integer(1), 1)
    pipeline_parallel: int = key(integer(1), 1)
    sequence_parallel: bool = key(SWITCH, False)
    distributed_optimizer: bool = key(SWITCH, True)
    bf16: bool = key(SWITCH, True)

    log_interval: int = key(integer(1), 10)
    eval_interval: int = key(integer(0), 0)  # 0: at the end only
    eval_batches: int = key(integer(1), 20)
    save_interval: int = key(integer(0), 0)  # 0: at the end only
    watch_interval: int = key(integer(1), 100)  # of --watch

    def data_parallel(self, world_size: int) -> int:
        """How many replicas of the model `world_size` ranks hold."""
        return world_size // (self.tensor_parallel * self.pipeline_parallel)

    def micro_batches(self, world_size: int) -> int:
        """How many micro batches each replica takes in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel(world_size))


def read_recipe(path: Path, overrides: Sequence[str] = (), world_size: int = 1) -> Recipe:
    """The recipe at `path` with `key=value` overrides, checked for `world_size` ranks."""
    recipe = read(Recipe, path, overrides)
    _check_together(recipe, world_size)
    return recipe


def _check_together(recipe: Recipe, world_size: int) -> None:
    r, heads = recipe, recipe.num_attention_heads
    if r.hidden_size % heads:
        raise ValueError(
            f"num_attention_heads takes a divisor of hidden_size {r.hidden_size}, got {heads}"
        )
    if heads % r.tensor_parallel:
        raise ValueError(
            f"tensor_parallel takes a divisor of num_attention_heads {heads}, got "
            f"{r.tensor_parallel}"
        )
    if r.num_layers % r.pipeline_parallel:
        raise ValueError(
            f"pipeline_parallel takes a divisor of num_layers {r.num_layers}, got "
            f"{r.pipeline_parallel}"
        )
    if r.sequence_parallel and (r.tensor_parallel == 1 or r.seq_length % r.tensor_parallel):
        raise ValueError(
            "sequence_parallel takes a tensor_parallel above 1 that divides seq_length "
            f"{r.seq_length}, got {r.tensor_parallel}"
        )
    if world_size % (r.tensor_parallel * r.pipeline_parallel):
        raise ValueError(
            "WORLD_SIZE takes a multiple of tensor_parallel × pipeline_parallel = "
            f"{r.tensor_parallel} × {r.pipeline_parallel}, got {world_size}"
        )
    replicas = r.data_parallel(world_size)
    if r.global_batch_size % (r.micro_batch_size * replicas):
        raise ValueError(
            "global_batch_size takes a multiple of micro_batch_size × data-parallel ranks = "
            f"{r.micro_batch_size} × {replicas}, got {r.global_batch_size}"
        )
    if r.min_lr > r.lr:
        raise ValueError(f"min_lr takes at most lr {r.lr}, got {r.min_lr}")
    if r.lr_warmup_steps >= r.train_steps:
        raise ValueError(
            f"lr_warmup_steps takes less than train_steps {r.train_steps}, got {r.lr_warmup_steps}"
        )
