"""Megatron-core: what its parameters are in the whole model, and which piece of each its optimizers
step.

Ranks of one model hold different parameters (pipeline stages, experts) and, under the distributed
optimizer, different pieces of the same ones: every rank lists all parameters of its stage, in the
model's order, with or without a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layouts.buffers import Buffer, Layout, Parameter, Shard, Spread
from ...layouts.modules import kinds_of
from ...layouts.tensor_parallel import band_of, shardings_of
from .fsdp import fsdp_buffers, is_fsdp
from .modules import fused_weights, global_names, shape_of
from .offload import CpuOffload

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The name that all copies of a tied embedding go by: that on the first stage.
_TIED_NAME = "embedding.word_embeddings.weight"


class Groups(NamedTuple):
    """Megatron's process groups, as far as matrices are spread over them."""

    tensor: ProcessGroup | None
    expert_tensor: ProcessGroup | None
    # None where they have but one rank:
    pipeline: ProcessGroup | None
    expert: ProcessGroup | None
    embedding: ProcessGroup | None  # the stages that keep a copy of the tied embedding


def read_layout(
    wrapper: Any,
    model: Sequence[nn.Module],
    stepped: Sequence[Sequence[Tensor]],
    groups: Groups,
    *,
    split_fused: bool,
    is_part: bool,
) -> Layout:
    """Return the layout of what one of Megatron's optimizers gives its inner optimizer to step.

    Collective over the tensor-parallel groups.

    Args:
        wrapper: FP32Optimizer, Float16OptimizerWithFloat16Params or DistributedOptimizer.
        model: the model's chunks on this rank, as ``get_megatron_optimizer`` got them.
        stepped: the model's parameters per parameter group, before the wrapper replaced them.
        groups: the process groups.
        split_fused: whether linear_qkv and a gated linear_fc1 are several matrices each.
        is_part: whether ``model`` lacks chunks that this rank has; those of other stages then step
            at other times.

    Raises:
        ValueError: the wrapper, or a module, is one whose layout is not understood.
    """
    parameters = _parameters(model, groups, split_fused)
    buffers = fsdp_buffers if is_fsdp(wrapper) else _buffers
    return Layout(
        list(buffers(wrapper, stepped, lambda param: parameters[id(param)])),
        parameters=list(parameters.values()),
        gather=None if is_part else lambda facts: _gather(facts, groups),
        is_part=is_part,
    )


def stepped_layout(
    wrapper: Any, model: Sequence[nn.Module], wanted: Collection[int]
) -> tuple[list[Tensor], Layout]:
    """Return some of the parameters that one of Megatron's optimizers steps, whatever steps inside
    it, and their layout, a buffer for each.

    Collective over the tensor-parallel groups.

    Args:
        wrapper: see :func:`read_layout`.
        model: likewise.
        wanted: the ``id`` of every parameter that is asked for.

    Raises:
        ValueError: see :func:`read_layout`.
    """
    kind = type(wrapper).__name__
    if is_fsdp(wrapper):
        stepped = [param for group in wrapper.optimizer.param_groups for param in group["params"]]
    elif kind == "DistributedOptimizer":  # has on every rank those, too, of which others have all
        stepped = [param for buffer in wrapper.buffers for param in buffer.param_index_map]
    elif kind == "Float16OptimizerWithFloat16Params":
        halves, floats = wrapper.float16_groups, wrapper.fp32_from_fp32_groups
        stepped = [param for params in (*halves, *floats) for param in params]
    else:
        stepped = [param for group in wrapper.param_groups for param in group["params"]]
    params = [param for param in stepped if id(param) in wanted]
    groups = groups_of(None)
    return params, read_layout(wrapper, model, [params], groups, split_fused=False, is_part=False)


def groups_of(collection: Any) -> Groups:
    """Return the process groups of a ProcessGroupCollection, or else of parallel_state."""
    from megatron.core import parallel_state

    def find(key: str, getter: str) -> Any:
        group = getattr(collection, key, None)
        return (
            group if group is not None else getattr(parallel_state, getter)(check_initialized=False)
        )

    def several(key: str, getter: str) -> Any:
        group = find(key, getter)
        return None if group is None or dist.get_world_size(group) < 2 else group

    return Groups(
        tensor=find("tp", "get_tensor_model_parallel_group"),
        expert_tensor=find("expt_tp", "get_expert_tensor_parallel_group"),
        pipeline=several("pp", "get_pipeline_model_parallel_group"),
        expert=several("ep", "get_expert_model_parallel_group"),
        embedding=several("embd", "get_embedding_group"),
    )


def _buffers(
    wrapper: Any, stepped: Sequence[Sequence[Tensor]], describe: Callable[[Tensor], Parameter]
) -> Iterator[Buffer]:
    kind = type(wrapper).__name__
    # By id of the model's parameter: the tensor, and where it starts in the parameter.
    held: dict[int, tuple[Tensor, int]] = {}
    process_groups: tuple[ProcessGroup, ...] = ()
    if kind == "FP32Optimizer":
        held = {id(param): (param, 0) for params in stepped for param in params}
    elif kind == "Float16OptimizerWithFloat16Params":
        held = {
            id(param): (param, 0) for params in wrapper.fp32_from_fp32_groups for param in params
        }
        for param, main in _pairs(wrapper.float16_groups, wrapper.fp32_from_float16_groups):
            held[id(param)] = main, 0
    elif kind == "DistributedOptimizer":
        is_offloaded = isinstance(wrapper.optimizer, CpuOffload)
        of_float16 = wrapper.shard_fp32_from_float16_groups
        masters = [
            *_pairs(wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
            *_pairs(
                wrapper.model_float16_groups,
                wrapper.shard_float16_groups if is_offloaded else of_float16,
            ),
        ]
        if is_offloaded:
            masters = [(p, wrapper.optimizer.master(piece)) for p, piece in masters]
        held = {
            id(p): (shard, wrapper._get_model_param_range_map(p)["param"].start)
            for p, shard in masters
        }
        if dist.get_world_size(wrapper.data_parallel_group) > 1:
            process_groups = (wrapper.data_parallel_group,)
    else:
        raise ValueError(
            f"AdamW2: Megatron's {kind} steps tensors in a layout that AdamW2 does not understand; "
            f"it takes FP32Optimizer, Float16OptimizerWithFloat16Params and DistributedOptimizer."
        )
    for number, params in enumerate(stepped):
        for param in params:
            tensor, start = held.get(id(param), (None, 0))
            if tensor is None:
                tensor = torch.empty(0, device=param.device)
            shard = Shard(describe(param), start, start + tensor.numel(), 0)
            yield Buffer(tensor, (shard,), process_groups, number)


def _pairs(
    model: Sequence[Sequence[Tensor]], main: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for params, masters in zip(model, main, strict=True):
        yield from zip(params, masters, strict=True)


def _parameters(
    model: Sequence[nn.Module], groups: Groups, split_fused: bool
) -> dict[int, Parameter]:
    """Describe every trained parameter of the model's chunks, by ``id``. Collective over the
    tensor-parallel groups.
    """
    names = global_names(model, 0 if groups.expert is None else dist.get_rank(groups.expert))
    params = {id(p): p for chunk in model for p in chunk.parameters() if p.requires_grad}
    # Routed experts have tensor-parallel groups of their own.
    experts = {number for number in params if ".experts." in names[number]}
    shardings = {
        **shardings_of(
            [(names[n], p) for n, p in params.items() if n not in experts],
            groups.tensor,
            shape_of=shape_of,
        ),
        **shardings_of(
            [(names[n], p) for n, p in params.items() if n in experts],
            groups.expert_tensor,
            shape_of=shape_of,
        ),
    }
    fused = fused_weights(model, shardings) if split_fused else {}
    kinds = {name: kind for chunk in model for name, kind in kinds_of(chunk, names).items()}
    described = {}
    for number, p in params.items():
        tied = _tied(p, groups.embedding)
        described[number] = band_of(
            _TIED_NAME if tied else names[number],
            shape_of(p),
            shardings.get(number),
            spreads=tied,
            fused=fused.get(number),
            kind=kinds.get(names[number]),
        )
    return described


def _tied(param: Tensor, group: ProcessGroup | None) -> tuple[Spread, ...]:
    """Return the pipeline stages that each keep a copy of ``param``: it is measured on the first,
    for all of them.
    """
    if group is None or not getattr(param, "shared_embedding", False):
        return ()
    return (Spread(group, dist.get_rank(group), is_copied=True),)


def _gather(facts: Any, groups: Groups) -> list[Any]:
    """Return the facts of every pipeline stage and every rank of experts. Collective over both
    groups.
    """
    gathered = [facts]
    for group in (groups.pipeline, groups.expert):
        if group is not None:
            by_rank: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(by_rank, gathered, group=group)
            gathered = [facts for lists in by_rank for facts in lists]
    return gathered
