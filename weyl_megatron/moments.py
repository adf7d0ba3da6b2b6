"""What M and V are kept in, where that is another dtype than their weight's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .environment import say_once

#: The moments in a parameter's state, and what amsgrad adds.
MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST = "max_exp_avg_sq"

#: Of M and of V.
Dtypes = tuple[torch.dtype, torch.dtype]

#: Beyond it V in bfloat16, of eight digits, stands still: a step changes it by less than half of
#: the last one.
_MOST_BETA2 = 0.98


#: What M and V may be kept in, by name and as it is. In float16 small gradients would be 0.
_STATE_DTYPES: dict[str | torch.dtype, torch.dtype] = {
    name: dtype
    for dtype in (torch.float32, torch.bfloat16)
    for name in (dtype, str(dtype), str(dtype).removeprefix("torch."))
}


def read(given: Any) -> Dtypes | None:
    """Return the dtypes of M and V that ``state_dtype`` asks for, or None.

    Raises:
        ValueError: it is neither float32 nor bfloat16, nor a pair of them.
    """
    if given is None:
        return None
    pair = given if isinstance(given, Sequence) and not isinstance(given, str) else [given] * 2
    dtypes = [_STATE_DTYPES.get(each) for each in pair if isinstance(each, (str, torch.dtype))]
    first, second = dtypes if len(pair) == len(dtypes) == 2 else (None, None)
    if first is None or second is None:
        raise ValueError(
            f"AdamW2: state_dtype got {given!r}, it takes 'float32', 'bfloat16', a pair of them "
            "for exp_avg and exp_avg_sq, or None (the weights')."
        )
    return first, second


def dtype_of(
    key: str, tensor: Tensor, group: Mapping[str, Any], dtypes: Dtypes | None
) -> torch.dtype:
    """Return the dtype that a moment is kept in; V is in float32 where it would stand still."""
    if dtypes is None:
        return tensor.dtype
    dtype = dtypes[key != "exp_avg"]
    if key == "exp_avg" or not warn_of_frozen(dtype, group, "is kept in float32"):
        return dtype
    return torch.float32


def warn_of_frozen(dtype: torch.dtype, group: Mapping[str, Any], what: str) -> bool:
    """Whether V of a dtype would stand still; the log says so once."""
    is_frozen = dtype == torch.bfloat16 and freezes(group)
    if is_frozen:
        beta2 = float(group["betas"][1])
        say_once(
            f"AdamW2: exp_avg_sq in torch.bfloat16 stands still at beta2 {beta2:g}, it {what}; "
            f"bfloat16 takes a beta2 of {_MOST_BETA2} at most."
        )
    return is_frozen


def freezes(group: Mapping[str, Any]) -> bool:
    """Whether V in bfloat16 would stand still at the β₂ of a parameter group."""
    return float(group["betas"][1]) > _MOST_BETA2


def keep(
    state: Mapping[Tensor, dict[str, Any]],
    param_groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    dtypes: Dtypes | None,
) -> None:
    """Give loaded moments the dtypes that they are kept in: torch gives them the weight's, and
    takes digits from moments in float32 beside a weight in bfloat16.

    Args:
        state: as it was loaded.
        param_groups: the optimizer's.
        saved: the states of the state dict, by its numbers.
        saved_groups: its groups, of these.
        dtypes: of M and V; None: the weights'.
    """
    if dtypes is None:
        return
    for group, other in zip(param_groups, saved_groups, strict=True):
        for tensor, number in zip(group["params"], other["params"], strict=True):
            entry, given = state.get(tensor, {}), saved.get(number, {})
            for key in entry.keys() & {*MOMENTS, LARGEST}:
                loaded, moment = entry[key], given.get(key)
                if not isinstance(moment, Tensor) or moment.shape != loaded.shape:
                    moment = loaded  # a hook of the user's made another of it
                dtype = dtype_of(key, tensor, group, dtypes)
                entry[key] = moment.to(loaded.device, dtype)
