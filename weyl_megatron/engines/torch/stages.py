"""Ranks that have other parameters than this one, as the stages of a pipeline, or those of torch's
ZeroRedundancyOptimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ...settings import BALANCED
from ...transformer.roles import is_io_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: What shares out whole parameters among the ranks, each of which then has an AdamW2 of its own.
_PARTITIONER = "torch.distributed.optim.zero_redundancy_optimizer"


def refuse_partition(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where a budget would be shared by a rank's own parameters alone, as torch's
    ZeroRedundancyOptimizer calls this step.
    """
    if _PARTITIONER not in sys.modules or all(g["tau"] != BALANCED for g in param_groups):
        return
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _PARTITIONER:
            raise ValueError(
                f"AdamW2: tau got '{BALANCED}' under ZeroRedundancyOptimizer, whose ranks have "
                "other parameters each; it takes a number, or model=model beside "
                "budget_group=torch.distributed.group.WORLD."
            )


def gathered(facts: Mapping[str, Any], group: ProcessGroup) -> list[Any]:
    """Return the facts of all ranks of ``group``.

    Args:
        facts: what a rank tells of its parameters, by name.

    Raises:
        ValueError: a matrix of two ranks has one name: which are the same cannot be told. An
            embedding that two stages have a copy of takes no part in a budget.
    """
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, dict(facts), group=group)
    seen: set[str] = set()
    for of_rank in by_rank:
        hidden = {name for name, fact in of_rank.items() if fact.matrices and not is_io_name(name)}
        if both := sorted(hidden & seen):
            raise ValueError(
                f"AdamW2: budget_group got ranks that have a matrix '{both[0]}' each, it takes "
                "ranks whose parameters have other names, those of the whole model."
            )
        seen |= hidden
    return by_rank
