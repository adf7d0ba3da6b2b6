"""Where a rank stands among those that train a model, and how the ranks' numbers become one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import nn

from ..layouts.local import is_fully_sharded, is_on_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How the readings of several ranks become one: they are the same on all, their mean, the root of
#: the sum of their squares, or the largest.
ONCE, MEAN, NORM, MAX = "once", "mean", "norm", "max"


class Reading(NamedTuple):
    """A number that this rank measured, and how it goes together with the others'."""

    value: float
    kind: str  # ONCE, MEAN, NORM or MAX


class Ranks:
    """Where this rank stands among those that train the model.

    Raises:
        ValueError: torch spreads a parameter in a way that is neither data parallelism nor tensor
            parallelism over all ranks.
    """

    def __init__(self, engine: Any, chunks: Sequence[nn.Module]) -> None:
        self.data_parallel, self.data_rank, self.tensor_rank = 1, 0, 0
        self.tensor_group: ProcessGroup | None = None  # torch's, where it has several ranks
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
        grid = _Grid(chunks)
        if grid.data or grid.tensor:
            self.data_parallel, self.tensor_group = max(1, len(grid.data)), grid.tensor_group
            if grid.data:
                self.data_rank = grid.data.index(dist.get_rank())
            if grid.tensor:
                self.tensor_rank = grid.tensor.index(dist.get_rank())
            return
        group = getattr(engine, "data_parallel_group", None)
        self.data_parallel, self.data_rank = dist.get_world_size(group), dist.get_rank(group)


class _Grid:
    """The ranks as torch's meshes have them: those with other data, times those with other bands.

    Under FSDP2 and HSDP a parameter's mesh begins with the ranks that have other data; they lend
    each other all of it while its layer computes. What is left then is tensor parallelism's.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.data: tuple[int, ...] = ()  # with this rank among them; (): no parameter says
        self.tensor: tuple[int, ...] = ()
        self.tensor_group: ProcessGroup | None = None
        last: tuple[str, Any] | None = None
        for chunk in chunks:
            is_sharded = is_fully_sharded(chunk)
            for name, parameter in chunk.named_parameters():
                if hasattr(parameter, "_st_info"):  # DDP's, of what was a DTensor
                    raise ValueError(
                        f"watch: parameter '{name}' got DDP over tensor parallelism, which makes "
                        "new parameters in every forward pass; it takes FSDP2 or HSDP over it."
                    )
                if is_on_mesh(parameter):
                    last = (name, parameter)
                    self._add(name, parameter, is_sharded)
        ranks = max(1, len(self.data)) * max(1, len(self.tensor))
        if last is not None and ranks != dist.get_world_size():
            raise _refusal(*last)

    def _add(self, name: str, parameter: Any, is_sharded: bool) -> None:
        mesh, placements = parameter.device_mesh, parameter.placements
        place = mesh.get_coordinate()
        shared = 0  # dimensions of ranks with other data
        if is_sharded:
            is_copied = placements[0].is_replicate()  # by HSDP, or by tensor parallelism alone
            shared = 1 if not is_copied else 2 if mesh.ndim > 1 else 0
        if place is None or mesh.ndim > shared + 1:
            raise _refusal(name, parameter)
        data: tuple[int, ...] = ()
        if shared:
            beside: tuple[Any, ...] = (..., *place[shared:])
            data = tuple(mesh.mesh[beside].flatten().tolist())
        tensor: tuple[int, ...] = ()
        if mesh.ndim > shared and mesh.size(shared) > 1:
            tensor = tuple(mesh.mesh[tuple(place[:shared])].flatten().tolist())
        if (data and self.data not in ((), data)) or (tensor and self.tensor not in ((), tensor)):
            raise _refusal(name, parameter)
        self.data = data or self.data
        if tensor and not self.tensor:
            self.tensor, self.tensor_group = tensor, mesh.get_group(shared)


def _refusal(name: str, parameter: Any) -> ValueError:
    mesh = parameter.device_mesh
    return ValueError(
        f"watch: parameter '{name}' got the placements {parameter.placements} on a mesh of shape "
        f"{tuple(mesh.shape)}, it takes those of FSDP2, HSDP, tensor parallelism in one dimension "
        "and both together, which name all ranks."
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
