"""DeepSpeed's wrappers: what lies where in the flat fp32 partitions that they give the optimizer.

ZeRO-1 and 2 (and BF16_Optimizer) flatten a parameter group, reordered or padded as their options
say, and give rank r the r-th equal slice: matrices straddle ranks in mid-row. Where a parameter
lies is read off the parameter itself, whose data is a view of the flat buffer. ZeRO-3 cuts every
parameter into equal pieces and packs a sub-group's pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...layouts.buffers import Buffer, Parameter, Shard

#: Elements that are compared at a time.
_PIECE = 2**22

#: Gives the description of one of the model's parameters: its name, full local shape and tensor
#: parallelism.
Describe = Callable[[Tensor], Parameter]


def flat_partition_buffers(
    groups: list[list[Tensor]],
    partitions: list[Tensor],
    process_groups: list[Any],
    describe: Describe,
    masters: Masters,
) -> Iterator[Buffer]:
    """Yield the buffers of ZeRO-1, ZeRO-2 and BF16_Optimizer: one equal slice of each flattened
    parameter group.

    Args:
        groups: the model's parameters, per parameter group; their data are views of the group's
            flat buffer.
        partitions: this rank's fp32 slice of each group.
        process_groups: the data-parallel group of each group.
        describe: describes a parameter of the model.
        masters: what the partitions held when they were made.

    Raises:
        ValueError: a slice does not hold the weights that this layout says it holds.
    """
    for params, partition, process_group in zip(groups, partitions, process_groups, strict=True):
        begin = dist.get_rank(process_group) * partition.numel()
        shards = []
        for param in params:
            at = int(param.storage_offset()) - begin
            start = min(max(-at, 0), param.numel())
            stop = max(start, min(param.numel(), partition.numel() - at))
            shard = Shard(describe(param), start, stop, at + start if start < stop else 0)
            masters.check(param.detach().view(-1)[start:stop], partition, shard, "ZeRO")
            shards.append(shard)
        yield Buffer(partition, tuple(shards), _spread(process_group))


def zero3_buffers(
    sub_groups: list[list[Any]],
    partitions: list[Tensor],
    swapped: list[int | None],
    describe: Describe,
    masters: Masters,
) -> Iterator[Buffer]:
    """Yield the buffers of ZeRO-3: per sub-group, equal pieces of every parameter, each padded to
    the same length.

    Args:
        sub_groups: the model's parameters, per sub-group.
        partitions: this rank's fp32 pieces of each.
        swapped: of each that is kept in a file how many elements it has in a step, else None.
        describe: describes a parameter of the model.
        masters: what the partitions held when they were made.

    Raises:
        ValueError: a partition does not hold the weights that this layout says it holds.
    """
    for params, partition, in_file in zip(sub_groups, partitions, swapped, strict=True):
        shards, at = [], 0
        for param in params:
            piece = param.partition_numel()
            start = min(dist.get_rank(param.ds_process_group) * piece, param.ds_numel)
            stop = min(start + piece, param.ds_numel)
            shard = Shard(describe(param), start, stop, at)
            if in_file is None and is_here(param):
                masters.check(
                    param.ds_tensor.detach().view(-1)[: stop - start], partition, shard, "ZeRO-3"
                )
            shards.append(shard)
            at += piece
        size = partition.numel() if in_file is None else in_file
        if at != size:
            raise ValueError(
                f"AdamW2: DeepSpeed ZeRO-3's partition from parameter '{shards[0].parameter.name}' "
                f"on has {size} elements, but its layout takes {at}."
            )
        spread = _spread(params[0].ds_process_group)
        yield Buffer(partition, tuple(shards), spread, swapped=in_file)


def master_copy_buffers(
    groups: list[list[Tensor]], copies: list[list[Tensor]], describe: Describe, masters: Masters
) -> Iterator[Buffer]:
    """Yield the buffers of FP16_UnfusedOptimizer (ZeRO-0 in fp16 or bf16): an fp32 copy of every
    whole parameter.
    """
    for params, of_group in zip(groups, copies, strict=True):
        for param, copy in zip(params, of_group, strict=True):
            shard = Shard(describe(param), 0, param.numel(), 0)
            masters.check(
                param.detach().reshape(-1),
                copy.detach().reshape(-1),
                shard,
                "FP16_UnfusedOptimizer",
            )
            yield Buffer(copy, (shard,))


def is_here(param: Any) -> bool:
    """Whether this rank's piece of a parameter of ZeRO-3's is in memory, and not in a file."""
    status = getattr(param.ds_tensor, "status", None)
    return getattr(status, "name", "AVAILABLE") == "AVAILABLE"


def _spread(process_group: Any) -> tuple[Any, ...]:
    return (process_group,) if dist.get_world_size(process_group) > 1 else ()


class Masters:
    """What the fp32 partitions of one engine held in the place of each parameter when it was built.

    The model's weights are in them then; a release that lays its buffers out in a new way is found,
    instead of silently measuring other matrices. Afterwards they may hold anything: DeepSpeed lets
    the user set them. But weights that were changed in the model alone would be lost at the first
    step.
    """

    def __init__(self) -> None:
        self._bits: dict[tuple[str, int, int], int] = {}

    def check(self, weights: Tensor, partition: Tensor, shard: Shard, engine: str) -> None:
        """Compare the model's ``weights`` with what ``partition`` holds of them.

        Raises:
            ValueError: they differ, at the first call, or while the partition holds what it held
                then.
        """
        master = partition.detach()[shard.offset : shard.offset + shard.stop - shard.start]
        key = shard.parameter.name, shard.start, shard.offset
        if master.numel() == weights.numel():
            if _are_equal(master, weights):
                self._bits.setdefault(key, _bits(master))
                return
            if key in self._bits and self._bits[key] != _bits(master):
                return
        raise ValueError(
            f"AdamW2: DeepSpeed {engine}'s partition does not hold the weights of parameter "
            f"'{shard.parameter.name}' where this DeepSpeed's layout puts them (were the weights "
            f"changed after deepspeed.initialize, and not by its safe_set_full_fp32_param?)."
        )


def _are_equal(master: Tensor, weights: Tensor) -> bool:
    low = torch.nan_to_num(master.to(weights.dtype)), torch.nan_to_num(weights).to(master.device)
    return torch.equal(*low)


def _bits(values: Tensor) -> int:
    """Return a number that tells one content, and one order of it, from others."""
    integers = values.view({4: torch.int32, 2: torch.int16}[values.element_size()])
    ramp = torch.arange(1, min(_PIECE, max(1, integers.numel())) + 1, device=values.device)
    total = 0
    for number, piece in enumerate(torch.split(integers, _PIECE), 1):
        total = (31 * total + number * int((piece * ramp[: piece.numel()]).sum())) % 2**64
    return total
