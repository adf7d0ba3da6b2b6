"""Where a rank stands among those that train a model, and how the ranks' numbers become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

#: How the readings of several ranks become one: they are the same on all, their mean, or the root
#: of the sum of their squares.
ONCE, MEAN, NORM = "once", "mean", "norm"


class Reading(NamedTuple):
    """A number that this rank measured, and how it goes together with the others'."""

    value: float
    kind: str  # ONCE, MEAN or NORM


class Ranks:
    """Where this rank stands among those that train the model."""

    def __init__(self, engine: Any, chunks: Sequence[nn.Module]) -> None:
        self.data_parallel, self.data_rank, self.tensor_rank = 1, 0, 0
        self.sequence_parallel, self.is_writer = False, True
        if not (dist.is_available() and dist.is_initialized()):
            return
        self.is_writer = dist.get_rank() == 0
        modules = (module for chunk in chunks for module in chunk.modules())
        megatron = next((module for module in modules if hasattr(module, "linear_qkv")), None)
        config: Any = getattr(megatron, "config", None)
        if config is not None:
            from megatron.core import parallel_state as state

            self.data_parallel = state.get_data_parallel_world_size(with_context_parallel=True)
            self.data_rank = state.get_data_parallel_rank(with_context_parallel=True)
            self.tensor_rank = state.get_tensor_model_parallel_rank()
            self.sequence_parallel = bool(config.sequence_parallel)
            return
        group = getattr(engine, "data_parallel_group", None)
        self.data_parallel, self.data_rank = dist.get_world_size(group), dist.get_rank(group)


def gather(item: Any) -> list[Any] | None:
    """Return every rank's item, on rank 0; None on the others."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [item]
    items: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(item, items)
    return items


def joined(readings: Sequence[Mapping[str, Reading]]) -> dict[str, float]:
    """Return the numbers by tag that all ranks' readings are together."""
    values: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for of_rank in readings:
        for tag, reading in of_rank.items():
            values.setdefault(tag, []).append(reading.value)
            kinds[tag] = reading.kind
    return {tag: _together(numbers, kinds[tag]) for tag, numbers in values.items()}


def _together(numbers: Sequence[float], kind: str) -> float:
    if kind == ONCE:
        return numbers[0]
    if kind == MEAN:
        return sum(numbers) / len(numbers)
    return math.sqrt(sum(number * number for number in numbers))
