"""Megatron's optimizer wrappers, as the engine that holds an AdamW2's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...layouts.buffers import Layout
from ...moments import Dtypes
from ...nonfinite import Guard
from ..engine import Known
from .fsdp import complete, is_fsdp
from .layout import Groups, read_layout


class Megatron:
    """See :class:`weyl_megatron.engines.engine.Engine`.

    Args:
        counts_in_groups: whether Megatron looks for the count of steps in the parameter groups.
    """

    steps_parameters = False

    def __init__(self, *, counts_in_groups: bool) -> None:
        self.counts_in_groups = counts_in_groups
        self.moment_dtypes: Dtypes | None = None
        self.norm: float | None = None  #: of all gradients, as Megatron took it last
        self._read: Callable[[], Layout] | None = None

    def attach(
        self,
        wrapper: Any,
        model: Sequence[nn.Module],
        stepped: Sequence[Sequence[Tensor]],
        groups: Groups,
        *,
        split_fused: bool,
        is_part: bool,
    ) -> None:
        """Take what Megatron put around the optimizer; the arguments are ``read_layout``'s."""
        self._read = functools.partial(
            read_layout, wrapper, model, stepped, groups, split_fused=split_fused, is_part=is_part
        )
        wrapper.init_state_fn = lambda optimizer, _=None: optimizer.allocate_state()
        _complete_checkpoints(wrapper)
        if is_fsdp(wrapper):
            complete(wrapper)
        _forget_at_saves(wrapper)
        _note_norm(wrapper)

    def is_constructing(self) -> bool:
        return False

    def read_layout(self, _: Known) -> Layout:
        if self._read is None:
            raise ValueError(
                "AdamW2: the optimizer that adamw2() returned got a step, it takes attach() first."
            )
        return self._read()

    def give_norm(self, guard: Guard) -> None:
        guard.norm, guard.needs_norm = lambda: self.norm, True


def _complete_checkpoints(wrapper: Any) -> None:
    """Mend, on one object, what Megatron's DistributedOptimizer does to checkpoints where it does
    not see FusedAdam.

    Without Transformer Engine and apex it reads the step from the state, which is not there before
    the first step; loading copies every entry of the state but leaves out the step, or takes it
    from the wrong place, after it was set right; and it copies into the model's own fp32 weights,
    which autograd forbids.
    """
    optimizer = wrapper.optimizer
    if type(wrapper).__name__ != "DistributedOptimizer":
        return
    state_dict, set_states = wrapper.state_dict, wrapper._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def of_allocated(*args: Any, **kwargs: Any) -> Any:
        optimizer.allocate_state()
        return state_dict(*args, **kwargs)

    @functools.wraps(set_states)
    @torch.no_grad()
    def keeping_step(model_param: Any, tensors: Mapping[str, Any]) -> None:
        group, number = wrapper.model_param_group_index_map[model_param]
        state = optimizer.state[optimizer.param_groups[group]["params"][number]]
        set_states(model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    wrapper.state_dict, wrapper._set_main_param_and_optimizer_states = of_allocated, keeping_step


def _forget_at_saves(wrapper: Any) -> None:
    """Have the run that goes on after a save measure afresh, as the run that is resumed from it
    does.

    A sharded checkpoint has one copy of the parameter groups, of the first rank, where the vectors
    of a state dict are; other ranks of the pipeline have other matrices. All ranks make the sharded
    state dict together.
    """
    optimizer, sharded_state_dict = wrapper.optimizer, wrapper.sharded_state_dict

    @functools.wraps(sharded_state_dict)
    def without_vectors(*args: Any, **kwargs: Any) -> Any:
        optimizer.forget()
        return sharded_state_dict(*args, **kwargs)

    wrapper.sharded_state_dict = without_vectors


def _note_norm(wrapper: Any) -> None:
    """Keep the norm of the gradients that Megatron takes, over all ranks, before it steps."""
    for name in ("get_grad_norm", "clip_grad_norm"):
        setattr(wrapper, name, _noting(getattr(wrapper, name), lambda *_: [wrapper]))
    # The optimizers of one model (its experts have one of their own) skip a step together.
    chained = import_module("megatron.core.optimizer.optimizer").ChainedOptimizer
    if not hasattr(chained.get_grad_norm, "adamw2"):
        chained.get_grad_norm = _noting(
            chained.get_grad_norm, lambda chain: chain.chained_optimizers
        )


def _noting(
    method: Callable[..., float], wrappers: Callable[..., Sequence[Any]]
) -> Callable[..., float]:
    @functools.wraps(method)
    def take_and_note(*args: Any, **kwargs: Any) -> float:
        norm = method(*args, **kwargs)
        for wrapper in wrappers(*args):
            engine = getattr(wrapper.optimizer, "engine", None)
            if isinstance(engine, Megatron):
                engine.norm = norm
        return norm

    take_and_note.adamw2 = True  # type: ignore[attr-defined]
    return take_and_note
