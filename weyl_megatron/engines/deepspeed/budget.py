"""Ranks that have other matrices than this one, pipeline stages and ranks of experts, and with it
share the budget of ``tau="balanced"``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist


def gather_of(engine: Any, names: Mapping[int, str]) -> Callable[[Any], list[Any]] | None:
    """Return what asks the other ranks for their parameters; None: this rank has a piece of all.

    Args:
        engine: whose ranks they are.
        names: of the engine's parameters, by ``id``.
    """
    if not (engine.pipeline_parallelism or engine.has_moe_layers):
        return None
    experts: dict[str, list[str]] = {}
    for param in engine.module.parameters():
        if not getattr(param, "allreduce", True):
            experts.setdefault(param.group_name, []).append(names[id(param)])
    stages = engine.module._grid.get_pipe_parallel_group() if engine.pipeline_parallelism else None
    return functools.partial(_gather, experts=experts, stages=stages)


def _gather(
    facts: Mapping[str, Any], experts: Mapping[str, list[str]], stages: Any
) -> list[Mapping[str, Any]]:
    """Return the facts of every stage. A weight that stages share has one name in them, and counts
    once; ranks of experts have other experts by the same names, whose matrices are added up.

    Args:
        facts: what this rank tells of its parameters, by name.
        experts: the names of this rank's experts, by the name of their process group.
        stages: the process group of the pipeline, or None.
    """
    told = dict(facts)
    for group_name in sorted(experts):
        expert_names = [name for name in experts[group_name] if name in told]
        counts = [told[name].matrices for name in expert_names]
        get_group = sys.modules["deepspeed.utils.groups"]._get_expert_parallel_group
        for name, *of_ranks in zip(
            expert_names, *_of_ranks(counts, get_group(group_name)), strict=True
        ):
            stepped = [count for count in of_ranks if count is not None]
            told[name] = told[name]._replace(matrices=sum(stepped) if stepped else None)
    return [told] if stages is None else _of_ranks(told, stages)


def _of_ranks(facts: Any, group: Any) -> list[Any]:
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, facts, group=group)
    return by_rank
