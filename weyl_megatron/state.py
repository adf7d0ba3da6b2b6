"""What the optimizer keeps of a parameter, M, V and a count: allocated, checked before a kernel
reads it, counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .kernels import Hyper
from .kernels.stepped import Form, check_form, extent_of
from .layouts.local import local, placements_of
from .moments import LARGEST, MOMENTS, Dtypes, dtype_of, warn_of_frozen
from .settings import check_harmless

#: The dtypes that a gradient may have beside a weight in float32.
_HALF = (torch.bfloat16, torch.float16)

#: Counts that share memory. A pickle of one holds that of all, so they are not many.
_COUNTS = 256


def new_state(
    tensor: Tensor, group: Mapping[str, Any], *, has_step: bool, dtypes: Dtypes | None = None
) -> dict[str, Tensor]:
    """Return the state of a tensor before its first step, as torch.optim.AdamW makes it.

    Args:
        tensor: the weight.
        group: its parameter group.
        has_step: whether the count of steps is in it.
        dtypes: of M and V; None: the weight's.
    """
    state = {} if not has_step else {"step": torch.tensor(0.0, dtype=_dtype(), device="cpu")}
    if dtypes is None:
        warn_of_frozen(tensor.dtype, group, "is kept so, as by torch.optim.AdamW")
    return state | {
        key: torch.zeros_like(
            tensor,
            dtype=dtype_of(key, tensor, group, dtypes),
            memory_format=torch.preserve_format,
        )
        for key in moment_keys(group)
    }


def moment_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a state's moments, M, V and, where it counts, the largest V."""
    return (*MOMENTS, LARGEST) if group["amsgrad"] else MOMENTS


class Counts:
    """How many steps were made of some parameters, counted in one operation.

    Each state's count is a view of memory that they share, made when the first step is counted, and
    anew where others were put in their places: a checkpoint may have handed one count to several
    parameters, or keep those that it gave.

    Args:
        states: of the parameters; counts in them keep their dtypes and shapes.
        steps: how many were made of each.
    """

    def __init__(self, states: Sequence[dict[str, Any]], steps: Sequence[float]) -> None:
        alike: dict[torch.dtype, list[int]] = {}
        for number, state in enumerate(states):
            step = state.get("step")
            dtype = step.dtype if isinstance(step, Tensor) else _dtype()
            alike.setdefault(dtype, []).append(number)
        self._numbers: list[int] = []  # of the states, in the order of the memory
        self._shared: list[Tensor] = []
        views: dict[int, Tensor] = {}
        for dtype, numbers in alike.items():
            for first in range(0, len(numbers), _COUNTS):
                some = numbers[first : first + _COUNTS]
                shared = torch.tensor([steps[n] for n in some], dtype=dtype, device="cpu")
                self._shared.append(shared)
                self._numbers += some
                for number, view in zip(some, shared.unbind(), strict=True):
                    step = states[number].get("step")
                    shape = step.shape if isinstance(step, Tensor) else view.shape
                    views[number] = view.view(shape)
        self._views = [views[number] for number in range(len(states))]
        self._addresses = list(map(Tensor.data_ptr, self._views))
        for state, view in zip(states, self._views, strict=True):
            state["step"] = view

    def read(self, states: Sequence[Mapping[str, Any]]) -> list[float] | None:
        """Return the counts of states, or None where they have others than those made here."""
        if not are_same([state.get("step") for state in states], self._views):
            return None
        if list(map(Tensor.data_ptr, self._views)) != self._addresses:  # after view.data = other
            return None
        steps = [0.0] * len(states)
        values = (value for shared in self._shared for value in shared.tolist())
        for number, value in zip(self._numbers, values, strict=True):
            steps[number] = float(value)
        return steps

    def count(self) -> None:
        """Count one step of every parameter."""
        if self._shared:
            torch._foreach_add_(self._shared, 1)


def are_same(objects: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(objects) == len(others) and all(map(is_, objects, others))


def steps_done(state: Mapping[Tensor, dict[str, Any]], tensors: Iterable[Tensor]) -> float:
    """Return how many steps of the first tensor that has a state were made."""
    counts = (state[tensor].get("step") for tensor in tensors if state.get(tensor))
    step: Any = next(counts, 0.0)
    is_number = isinstance(step, float | int) or (isinstance(step, Tensor) and step.numel() == 1)
    return float(step) if is_number else float("nan")  # which no checkpoint's is


def _dtype() -> torch.dtype:
    # A lower precision would stop counting: bfloat16 at 256.
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def check_gradient(grad: Tensor, form: Form, name: str) -> None:
    """Check the gradient of a weight (Algorithm 1, line 1); its memory order may be another.

    Args:
        grad: of the weight's dtype, or in half precision beside a weight in float32.
        form: the weight's.
        name: of the parameter, for sentences.

    Raises:
        ValueError: it is sparse, of another shape or dtype, on another device, or without memory.
    """
    if grad.is_sparse:
        raise ValueError(f"AdamW2: parameter '{name}' got a sparse gradient, it takes dense ones.")
    if form.dtype == torch.float32 and grad.dtype in _HALF:
        form = form._replace(dtype=grad.dtype)
    _check(grad, form, "the gradient", name)


def fit_moments(
    state: dict[str, Any],
    weight: Tensor,
    form: Form,
    group: Mapping[str, Any],
    name: str,
    dtypes: Dtypes | None = None,
) -> None:
    """Check M and V of a weight (line 2). Those in another memory order, of a checkpoint or from
    before the weight became channels_last, are replaced in ``state``, as is V in bfloat16 where a
    β₂ that became larger would freeze it.

    Args:
        state: of the weight, allocated.
        weight: dense, of any order of dimensions in memory.
        form: its form.
        group: its parameter group.
        name: of the parameter, for sentences.
        dtypes: of M and V, which then may be in float32, too; None: the weight's.

    Raises:
        ValueError: one of them is of another shape or dtype, on another device, without memory, or
            missing.
    """
    keys = moment_keys(group)
    for key in keys:
        moment = local(state.get(key))
        if not isinstance(moment, Tensor) or moment.layout != torch.strided:
            raise ValueError(
                f"AdamW2: the state of parameter '{name}' holds {', '.join(map(str, state))}, it "
                f"takes {', '.join(keys)}, dense tensors."
            )
        is_other = dtypes is not None and moment.dtype in {*dtypes, torch.float32}
        of_moment = form._replace(dtype=moment.dtype) if is_other else form
        _check(moment, of_moment, f"'{key}'", name)
        if (
            key != MOMENTS[0]
            and dtypes is not None
            and moment.dtype == torch.bfloat16
            and dtype_of(key, moment, group, dtypes) == torch.float32
        ):
            state[key] = state[key].float()
            moment = local(state[key])
        if moment.stride() != form.stride:
            state[key] = in_order_of(weight, moment)


def check_placements(
    state: Mapping[str, Any], tensor: Tensor, group: Mapping[str, Any], name: str
) -> None:
    """Raise ValueError where a moment is spread over ranks in another way than its parameter."""
    (expected,) = placements_of([tensor])
    keys = [key for key in moment_keys(group) if key in state]  # what is missing is said elsewhere
    for key, got in zip(keys, placements_of([state[key] for key in keys]), strict=True):
        if got != expected:
            raise ValueError(
                f"AdamW2: '{key}' of parameter '{name}' got the placements {got}, it takes its "
                f"parameter's, {expected}."
            )


def read_step(state: Mapping[str, Any], group: Mapping[str, Any], name: str) -> float:
    """Return how many steps of a parameter were made; its group counts where its state does not.

    Raises:
        ValueError: neither has a number.
    """
    step = state.get("step", group.get("step"))
    if step is None or (isinstance(step, Tensor) and step.numel() != 1):
        got = "none" if step is None else f"one of shape {tuple(step.shape)}"
        raise ValueError(f"AdamW2: 'step' of parameter '{name}' got {got}, it takes a number.")
    return float(step)


def hyper_of(group: Mapping[str, Any], steps: float) -> Hyper:
    """Return the hyperparameters of the step that follows ``steps`` others."""
    lr, beta1, beta2 = map(_scalar, (group["lr"], *group["betas"]))
    return Hyper(lr, beta1, beta2, group["eps"], group["weight_decay"], steps + 1)


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
    for key in (*MOMENTS, LARGEST):
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape != tensor.shape:
            raise ValueError(
                f"AdamW2: load_state_dict got '{key}' of shape {tuple(moment.shape)} for parameter "
                f"'{name}', it takes its shape, {tuple(tensor.shape)}."
            )
    if state and has_step and "step" not in state:
        raise ValueError(
            f"AdamW2: load_state_dict got {', '.join(map(str, state))} for parameter '{name}', it "
            f"takes step, {', '.join(MOMENTS)}."
        )


def counts_on_host(state: Mapping[Tensor, Any]) -> None:
    """Copy the counts of steps to the CPU: a fused AdamW has them on the device, and reading them
    there would wait; and whose state dict it was goes on counting in its own.
    """
    for entry in state.values():
        if isinstance(entry, dict) and isinstance(entry.get("step"), Tensor):
            entry["step"] = entry["step"].detach().to("cpu", copy=True)


def check_saved_groups(
    held: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], *, are_sizes_known: bool
) -> None:
    """Raise ValueError where a state dict's parameter groups cannot be the optimizer's, or have a
    flag that asks for what is not done.

    Args:
        held: the optimizer's.
        saved: the state dict's.
        are_sizes_known: whether nothing will change these before they are loaded.
    """
    own, others = ([len(group["params"]) for group in groups] for groups in (held, saved))
    if are_sizes_known and own != others:
        raise ValueError(
            f"AdamW2: load_state_dict got parameter groups of {others} parameters, it takes {own}, "
            "as many as the optimizer has."
        )
    moot = "capturable", "decoupled_weight_decay"  # torch's AdamW passes over them, too
    for group in saved:
        check_harmless({key: value for key, value in group.items() if key not in moot})


def _check(tensor: Tensor, form: Form, what: str, name: str) -> None:
    """Raise ValueError where a tensor is not of a form, whatever its memory order."""
    if tensor.stride() == form.stride:
        check_form(tensor, form, tensor.numel(), what, name)
    else:
        other = form._replace(stride=tensor.stride())
        check_form(tensor, other, extent_of(other), what, name)


def in_order_of(weight: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in the memory order of ``weight``."""
    return torch.empty_like(weight, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
