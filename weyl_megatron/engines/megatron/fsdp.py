"""Megatron-FSDP: its optimizer steps DTensors whose pieces are rows that no two ranks need have as
many of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layouts.buffers import Buffer, Parameter, Shard
from ...layouts.local import is_on_mesh, local
from ..torch.dtensor import Placed, placed


def is_fsdp(wrapper: Any) -> bool:
    """Whether one of Megatron's optimizers, or a chunk of a model, is Megatron-FSDP's."""
    return bool(getattr(getattr(wrapper, "ddp_config", None), "use_megatron_fsdp", False))


def has_dtensors(chunk: nn.Module) -> bool:
    """Whether Megatron-FSDP has the parameters of a chunk of a model in DTensors."""
    params = list(chunk.parameters())
    return is_fsdp(chunk) and bool(params) and all(map(is_on_mesh, params))


def complete(wrapper: Any) -> None:
    """Have a rank step, count and save what it has nothing of as the other ranks do.

    Megatron gives it no gradient there, and so no state, which its checkpoints then wait for.
    Loading makes the state by a step, which counts.
    """
    optimizer = wrapper.optimizer
    optimizer.register_step_pre_hook(_give_empty_gradients)
    wrapper._init_optimizer_states_with_dummy_values = optimizer.allocate_state


def _give_empty_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None and not local(param).numel():
                param.grad = torch.zeros_like(param)


def fsdp_buffers(
    _: Any, stepped: Sequence[Sequence[Tensor]], describe: Callable[[Tensor], Parameter]
) -> Iterator[Buffer]:
    """Yield a buffer for every parameter. Collective over their meshes.

    Args:
        stepped: the parameters of every parameter group, DTensors.
        describe: returns what a parameter is in the model under tensor parallelism alone.

    Raises:
        ValueError: a parameter is spread in a way that is no box on every rank.
    """
    described = [(param, describe(param)) for params in stepped for param in params]
    # Tensor parallelism, the mesh's last dimension, cuts first.
    places = placed([(known.name, param) for param, known in described], is_last_outermost=True)
    for param, known in described:
        held = local(param)
        whole = _in_the_whole(known, places[id(param)])
        yield Buffer(param, (Shard(whole, 0, held.numel(), 0),))


def _in_the_whole(parameter: Parameter, place: Placed) -> Parameter:
    """Return a parameter with the box and all the groups of a rank's piece."""
    known = {tuple(dist.get_process_group_ranks(spread.group)) for spread in place.spreads}
    others = (
        spread
        for spread in parameter.spreads  # of what tensor parallelism leaves alone, and a tied one
        if tuple(dist.get_process_group_ranks(spread.group)) not in known
    )
    return parameter._replace(shape=place.shape, box=place.box, spreads=(*place.spreads, *others))
