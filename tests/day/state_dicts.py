"""What a state dict of an optimizer may have become before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.day.forms import noise, reversed_dims


def _of(state: dict[str, Any], number: int) -> dict[str, Any]:
    """The state of one of the parameters that have one, in a state dict."""
    found: list[dict[str, Any]] = [each for each in state["state"].values() if each]
    return found[number % len(found)] if found else {}


def _reshaped(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], int], None]:
    def edit(state: dict[str, Any], number: int) -> None:
        one = _of(state, number)
        for key, value in one.items():
            if isinstance(value, Tensor) and key != "step":
                one[key] = change(value)

    return edit


def other_rows(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda value: noise(
        (max(0, value.shape[0] + rows) if value.dim() else 2, *value.shape[1:]), rows + 9
    ).abs()


def cast(dtype: torch.dtype) -> Callable[[dict[str, Any], int], None]:
    def edit(state: dict[str, Any], number: int) -> None:
        for one in state["state"].values():
            for key, value in one.items():
                if isinstance(value, Tensor) and key != "step":
                    one[key] = value.to(dtype)

    return edit


def _without_last(state: dict[str, Any], number: int) -> None:
    last = state["param_groups"][-1]["params"]
    if last:
        state["state"].pop(last.pop(), None)


def _without_state(state: dict[str, Any], number: int) -> None:
    if state["state"]:
        state["state"].pop(sorted(state["state"])[number % len(state["state"])])


def _without_square(state: dict[str, Any], number: int) -> None:
    _of(state, number).pop("exp_avg_sq", None)


def _without_group(state: dict[str, Any], number: int) -> None:
    state["param_groups"].pop()


def _counted(change: Callable[[float], Any]) -> Callable[[dict[str, Any], int], None]:
    def edit(state: dict[str, Any], number: int) -> None:
        for one in state["state"].values():
            if "step" in one:
                one["step"] = change(float(one["step"]))

    return edit


def _without_tau(state: dict[str, Any], number: int) -> None:
    for group in state["param_groups"]:
        group.pop("tau", None)


def _swapped(state: dict[str, Any], number: int) -> None:
    """Give two parameters each other's state, as where a model lists its parameters in another
    order.
    """
    keys = sorted(state["state"])
    if len(keys) > 1:
        one, other = keys[number % len(keys)], keys[(number + 1) % len(keys)]
        state["state"][one], state["state"][other] = state["state"][other], state["state"][one]


#: What a state dict may have become before it is loaded.
EDITS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "as it is": lambda state, number: None,
    "more rows": _reshaped(other_rows(4)),
    "many more rows": _reshaped(other_rows(1000)),
    "fewer rows": _reshaped(other_rows(-1)),
    "flat": _reshaped(lambda value: value.reshape(-1)),
    "one number": _reshaped(lambda value: torch.ones(())),
    "transposed": _reshaped(lambda value: reversed_dims(value).contiguous()),
    "transposed in memory": _reshaped(
        lambda value: reversed_dims(reversed_dims(value).contiguous())
    ),
    "one more dimension": _reshaped(lambda value: value[None]),
    "expanded": _reshaped(lambda value: torch.full((), 0.5).expand(value.shape)),
    "float64": cast(torch.float64),
    "bfloat16": cast(torch.bfloat16),
    "fewer parameters": _without_last,
    "a parameter without state": _without_state,
    "a parameter without exp_avg_sq": _without_square,
    "fewer groups": _without_group,
    "nothing": lambda state, number: state["state"].clear(),
    "steps as int": _counted(int),
    "steps as float": _counted(float),
    "steps as tensors of one": _counted(lambda step: torch.full((1,), step)),
    "steps as int64": _counted(lambda step: torch.tensor(int(step))),
    "without tau": _without_tau,
    "two states swapped": _swapped,
}
