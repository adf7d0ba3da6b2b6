"""Ranks that have other parameters than this one, as the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ...transformer.roles import is_io_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
