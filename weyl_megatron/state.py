"""What the optimizer keeps of a parameter, M, V and a count: allocated, checked before a kernel
reads it, counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import Hyper, Stepped
from .kernels.stepped import Form, check_form, extent_of
from .settings import check_harmless

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


def count(state: Mapping[Tensor, dict[str, Any]], tensors: Iterable[Tensor]) -> None:
    """Count the step of every tensor that has a gradient."""
    for tensor in tensors:
        if tensor.grad is not None:
            step = state[tensor]["step"]
            # In new memory: a checkpoint may have handed one count to several tensors.
            state[tensor]["step"] = step + 1 if isinstance(step, Tensor) else _count(step + 1)


def steps_done(state: Mapping[Tensor, dict[str, Any]], tensors: Iterable[Tensor]) -> float:
    """Return how many steps of the first tensor that has a state were made."""
    counts = (state[tensor].get("step") for tensor in tensors if state.get(tensor))
    step: Any = next(counts, 0.0)
    is_number = isinstance(step, float | int) or (isinstance(step, Tensor) and step.numel() == 1)
    return float(step) if is_number else float("nan")  # which no checkpoint's is


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


def check_loaded(
    param_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    names: Mapping[int, str],
    has_step: bool,
) -> None:
    """Raise ValueError where a state that is being loaded cannot be that of the parameters.

    Args:
        param_groups: with the optimizer's parameters.
        state: of each of them, as it was loaded.
        names: of the parameters, by ``id``, as far as they are known.
        has_step: whether the state has the count of steps.
    """
    for number, group in enumerate(param_groups):
        for position, param in enumerate(group["params"]):
            name = names.get(id(param), f"group{number}.param{position}")
            _check_loaded(param, state.get(param, {}), name, has_step)


def _check_loaded(tensor: Tensor, state: Mapping[str, Any], name: str, has_step: bool) -> None:
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


def counts_on_host(state: Mapping[Tensor, Any]) -> None:
    """Bring the counts of steps to the CPU: a fused AdamW has them on the device, and reading them
    there would wait.
    """
    for entry in state.values():
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            entry["step"] = entry["step"].cpu()


def check_saved_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a saved parameter group has a flag that asks for what is not done."""
    moot = "capturable", "decoupled_weight_decay"  # torch's AdamW passes over them, too
    check_harmless({key: value for key, value in group.items() if key not in moot})


def check_sizes(held: Sequence[int], saved: Sequence[int]) -> None:
    """Raise ValueError where a state dict has other parameter groups than the optimizer.

    Args:
        held: how many parameters each of the optimizer's groups has.
        saved: how many each of the state dict's groups has.
    """
    if held != saved:
        raise ValueError(
            f"AdamW2: load_state_dict got parameter groups of {saved} parameters, it takes {held}, "
            "as many as the optimizer has."
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
