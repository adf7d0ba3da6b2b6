"""What the optimizer keeps of a parameter, M, V and a count: allocated, checked before a kernel
reads it, counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .kernels import Hyper, Stepped
from .kernels.stepped import Form, check_form, extent_of

#: The moments in a parameter's state, and what amsgrad adds.
_MOMENTS = ("exp_avg", "exp_avg_sq")
_LARGEST = "max_exp_avg_sq"


def new_state(tensor: Tensor, group: Mapping[str, Any], *, has_step: bool) -> dict[str, Tensor]:
    """Return the state of a tensor before its first step, as torch.optim.AdamW makes it."""
    keys = (*_MOMENTS, _LARGEST) if group["amsgrad"] else _MOMENTS
    state = {} if not has_step else {"step": _count(0.0)}
    return state | {
        key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in keys
    }


def counted(step: Tensor | float) -> Tensor:
    """Return a count that is one higher, in new memory: several tensors may share the old one."""
    return step + 1 if isinstance(step, Tensor) else _count(step + 1)


def _count(step: float) -> Tensor:
    # A lower precision would stop counting: bfloat16 at 256.
    is_double = torch.get_default_dtype() == torch.float64
    return torch.tensor(step, dtype=torch.float64 if is_double else torch.float32, device="cpu")


def gather(
    weight: Tensor,
    form: Form,
    grad: Tensor,
    state: dict[str, Any],
    group: Mapping[str, Any],
    name: str,
) -> Stepped:
    """Return G, M and V of one weight (Algorithm 1, lines 1 and 2), of its form and in its memory
    order.

    Moments in another order, of a checkpoint or from before the weight became channels_last, are
    replaced in ``state``.

    Args:
        weight: dense, of any order of dimensions in memory.
        form: its form.
        grad: its gradient.
        state: its state, allocated.
        group: its parameter group; ``group["step"]`` counts where ``state`` has no step.
        name: of the parameter, for sentences.

    Raises:
        ValueError: one of them is of another shape or dtype, on another device, without memory, or
            missing.
    """
    if grad.is_sparse:
        raise ValueError(f"AdamW2: parameter '{name}' got a sparse gradient, it takes dense ones.")
    grad = _fitting(grad, weight, form, "the gradient", name)
    if group["maximize"]:
        grad = -grad
    keys = (*_MOMENTS, _LARGEST) if group["amsgrad"] else _MOMENTS
    for key in keys:
        moment = state.get(key)
        if not isinstance(moment, Tensor):
            raise ValueError(
                f"AdamW2: the state of parameter '{name}' holds {', '.join(map(str, state))}, it "
                f"takes {', '.join(keys)}."
            )
        state[key] = _fitting(moment, weight, form, f"'{key}'", name)
    step = state.get("step", group.get("step"))
    if step is None or (isinstance(step, Tensor) and step.numel() != 1):
        got = "none" if step is None else f"one of shape {tuple(step.shape)}"
        raise ValueError(f"AdamW2: 'step' of parameter '{name}' got {got}, it takes a number.")
    lr, beta1, beta2 = map(_scalar, (group["lr"], *group["betas"]))
    hyper = Hyper(lr, beta1, beta2, group["eps"], group["weight_decay"], float(step) + 1)
    largest = state[_LARGEST] if group["amsgrad"] else None
    return Stepped(grad, state["exp_avg"], state["exp_avg_sq"], hyper, largest)


def _scalar(value: Tensor | float) -> Tensor | float:
    return value.detach().reshape(()) if isinstance(value, Tensor) else value


def check_loaded(tensor: Tensor, state: Mapping[str, Any], name: str, *, has_step: bool) -> None:
    """Raise ValueError where a loaded state cannot be that of ``tensor``."""
    for key in (*_MOMENTS, _LARGEST):
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape != tensor.shape:
            raise ValueError(
                f"AdamW2: load_state_dict got '{key}' of shape {tuple(moment.shape)} for parameter "
                f"'{name}', it takes its shape, {tuple(tensor.shape)}."
            )
    if state and has_step and "step" not in state:
        raise ValueError(
            f"AdamW2: load_state_dict got {', '.join(map(str, state))} for parameter '{name}', it "
            f"takes step, {', '.join(_MOMENTS)}."
        )


def _fitting(tensor: Tensor, weight: Tensor, form: Form, what: str, name: str) -> Tensor:
    """Return ``tensor`` in the memory order of ``weight``; raise ValueError where it is not of its
    form.
    """
    if tensor.stride() == form.stride:
        check_form(tensor, form, tensor.numel(), what, name)
        return tensor
    other = form._replace(stride=tensor.stride())
    check_form(tensor, other, extent_of(other), what, name)
    return torch.empty_like(weight, requires_grad=False).copy_(tensor)
