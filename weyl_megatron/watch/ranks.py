"""Where a rank stands among those that train a model, and how the ranks' numbers become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..layouts.local import is_fully_sharded, is_on_mesh

#: How the readings of several ranks become one: they are the same on all, their mean, the root of
#: the sum of their squares, or the largest.
ONCE, MEAN, NORM, MAX = "once", "mean", "norm", "max"


class Reading(NamedTuple):
    """A number that this rank measured, and how it goes together with the others'."""

    value: float
    kind: str  # ONCE, MEAN, NORM or MAX


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


def refuse_bands(chunks: Sequence[nn.Module]) -> None:
    """Raise ValueError where torch spreads a parameter in another way than FSDP2 and HSDP do.

    These have every parameter whole while its layer computes, and every rank has tokens of its own.
    """
    for chunk in chunks:
        is_sharded = is_fully_sharded(chunk)
        for name, parameter in chunk.named_parameters():
            if is_on_mesh(parameter):
                refuse_band(name, parameter, is_whole_in_forward=is_sharded)


def refuse_band(name: str, parameter: Any, *, is_whole_in_forward: bool = False) -> None:
    """Raise ValueError where a DTensor is not whole on every rank while its layer computes.

    Args:
        name: the parameter's.
        parameter: the DTensor.
        is_whole_in_forward: whether ``fully_shard`` was called on its module.
    """
    mesh, outer = parameter.device_mesh, parameter.placements[:-1]
    # FSDP2's mesh has one dimension, HSDP's one of copies more.
    is_data_parallel = not outer or (len(outer) == 1 and outer[0].is_replicate())
    if is_whole_in_forward and is_data_parallel and mesh.size() == dist.get_world_size():
        return
    raise ValueError(
        f"watch: parameter '{name}' got the placements {parameter.placements} on a mesh of shape "
        f"{tuple(mesh.shape)}, it takes those of FSDP2 and HSDP over all ranks: under tensor "
        "parallelism no rank has a layer's weights whole."
    )


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
    if kind == MAX:
        return math.nan if any(map(math.isnan, numbers)) else max(numbers)
    return math.sqrt(sum(number * number for number in numbers))
