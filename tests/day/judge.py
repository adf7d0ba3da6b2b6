"""What AdamW2 may and may not do where torch's AdamW, on the same day, did what it did."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.day.worlds import World

#: What a sentence of ours may be raised as.
TAKEN = (ValueError, RuntimeError, KeyError, TypeError)


class Difference(NamedTuple):
    """A deliberate difference: AdamW2 takes what AdamW refuses, or refuses what it takes."""

    what: str
    why: str
    theirs: str  #: a pattern of AdamW's sentence; "" where it takes it
    ours: str  #: a pattern of AdamW2's; "" where it takes it

    def holds(self, theirs: BaseException | None, ours: BaseException | None) -> bool:
        """Whether this is what two worlds differ in."""
        pairs = ((self.theirs, theirs), (self.ours, ours))
        return all(
            (error is None) == (part == "") and re.search(part, str(error)) for part, error in pairs
        )


#: All of them.
DIFFERENCES = (
    Difference(
        "differentiable=True in a group",
        "a step that is differentiated would have to keep every iteration of σ₁; it is refused at "
        "construction, too",
        "",
        "differentiable got True",
    ),
    Difference(
        "capturable=True or a rate in words in a group, in a step without gradients",
        "groups are checked before gradients are looked for; AdamW refuses these as soon as there "
        "is one",
        "",
        r"capturable got True|lr got '0\.1'",
    ),
    Difference(
        "capturable=True in a state that was loaded",
        "it becomes False, as counts are on the host; AdamW on a CPU refuses it in the next step",
        "If capturable=True, params and state_steps must be on supported devices",
        "",
    ),
    Difference(
        "decoupled_weight_decay=False in a group",
        "that is Adam, whose weight decay is part of U: Rule 1 bounds another update",
        "",
        "decoupled_weight_decay got False",
    ),
    Difference(
        "a count that is a number, put into the state by hand",
        "it says what the tensor says, and torch's own load_state_dict makes a tensor of it",
        "`state_steps` argument must contain a list of singleton tensors",
        "",
    ),
    Difference(
        "an expanded moment, put into the state by hand",
        "moments in another memory order than the weight's are copied into that, and this is one",
        "more than one element of the written-to tensor refers to a single memory location",
        "",
    ),
    Difference(
        "a gradient in bf16 or fp16 beside a weight in float32",
        "engines hand such over, and torch lets a parameter have one; its numbers are exact in "
        "float32",
        "expected dtype float for `end` but got dtype c10::(BFloat16|Half)",
        "",
    ),
    Difference(
        "a moment without memory of a parameter of one number",
        "torch takes what has no dimension from any device, from meta, too, and then steps by "
        "anything",
        "",
        r"on meta, it takes its parameter's \(\),",
    ),
    Difference(
        "a weight of another dtype than its gradient and moments, which are of one",
        "no kernel steps two dtypes at once; load_state_dict, or backward after to(dtype), makes "
        "them one",
        "",
        r"is (\(.*\)), (torch\.\w+), on (\w+), it takes its parameter's \1, (?!\2,)torch\.\w+, on "
        r"\3",
    ),
    Difference(
        "a weight of another shape than its gradient and moments, which broadcast to it",
        "AdamW then moves all rows alike; what it takes for one number or row was the old weight's",
        "",
        r"is (\(.*?\)), torch\.\w+, on \w+, it takes its parameter's (?!\1,)\(",
    ),
    Difference(
        "a Parameter replaced by one of another number of dimensions",
        "engines replace parameters by flat ones, in which matrices that are there would be "
        "stepped unbounded",
        "",
        "in the place of a parameter another of as many dimensions",
    ),
)


class Wrong(Exception):
    """What AdamW2 did and may not."""


def check_error(error: BaseException, theirs: BaseException | None) -> None:
    """Raise Wrong where an error is neither torch's own, as AdamW has it, nor one sentence of
    ours.
    """
    if theirs is not None and type(error) is type(theirs) and str(error) == str(theirs):
        return
    words = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    if (
        not isinstance(error, TAKEN)
        or not str(words).startswith("AdamW2: ")
        or not str(words).endswith(".")
    ):
        raise Wrong(f"no sentence of ours: {type(error).__name__}: {words}")
    if "\n" in str(words):
        raise Wrong(f"more than one line: {words}")


def is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for the sign of zeros and what is in a NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.device.type == "meta":
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def check_same(theirs: World, ours: World) -> None:
    """Raise Wrong where weights, gradients or state are not AdamW's."""
    for number, (param, right) in enumerate(zip(ours.params, theirs.params, strict=True)):
        for what, found, expected in (
            ("weight", param.data, right.data),
            ("gradient", param.grad, right.grad),
        ):
            if (found is None) != (expected is None):
                raise Wrong(f"{what} {number} is {found}, AdamW's is {expected}")
            if found is None or found.layout != torch.strided or is_same(found, expected):
                continue
            # Two parameters in one memory decay and move the same numbers, in another order.
            if not (
                what == "weight" and ours.overlaps and torch.allclose(found, expected, atol=1e-3)
            ):
                raise Wrong(f"{what} {number} is not AdamW's")
        check_state(
            number, ours.optimizer.state.get(param, {}), theirs.optimizer.state.get(right, {})
        )


def check_state(number: int, state: dict[str, Any], right: dict[str, Any]) -> None:
    if state.keys() != right.keys():
        raise Wrong(f"state {number} has {sorted(state)}, AdamW's has {sorted(right)}")
    for key, expected in right.items():
        found = state[key]
        if type(found) is not type(expected):
            raise Wrong(
                f"{key} {number} is a {type(found).__name__}, AdamW's is a "
                f"{type(expected).__name__}"
            )
        if isinstance(expected, Tensor):
            if found.dtype != expected.dtype or found.shape != expected.shape:
                raise Wrong(
                    f"{key} {number} is {found.dtype}, AdamW's is {expected.dtype}, or of another "
                    "shape"
                )
            if not is_same(found, expected):
                raise Wrong(f"{key} {number} is not AdamW's")
        elif found != expected:
            raise Wrong(f"{key} {number} is {found}, AdamW's is {expected}")


def check_near(theirs: World, ours: World, before: list[Tensor]) -> None:
    """Raise Wrong where a bounded step is none of Algorithm 1's, given AdamW's moments and the
    weights before it.

    The moments are AdamW's up to rounding; a vector moved by α (U + λ W), and each element of a
    matrix by the same at a rate between 0 and α.
    """
    pairs = zip(ours.params, theirs.params, strict=True)
    groups = [group for group in ours.optimizer.param_groups for _ in group["params"]]
    for number, ((param, right), group, old) in enumerate(zip(pairs, groups, before, strict=True)):
        state, expected = ours.optimizer.state.get(param, {}), theirs.optimizer.state.get(right, {})
        if state.keys() != expected.keys():
            raise Wrong(f"state {number} has {sorted(state)}, AdamW's has {sorted(expected)}")
        if bool(right.isfinite().all()) and not bool(param.isfinite().all()):
            raise Wrong(f"weight {number} is not finite, AdamW's is")
        if (
            ours.diverges
            or ours.overlaps
            or not param.numel()
            or not expected
            or not bool(right.isfinite().all())
        ):
            continue
        eps = _eps(param, group)
        if param.grad is None:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            off = (state[key].double() - expected[key].double()).abs()
            scale = expected[key].double().abs().max()
            if not bool((off <= 16 * eps * scale).all()):
                raise Wrong(f"{key} {number} is {float((off / scale).max()):.2g} off AdamW's")
        if float(state["step"]) != float(expected["step"]):
            raise Wrong(
                f"step {number} is {float(state['step'])}, AdamW's is {float(expected['step'])}"
            )
        _check_move(number, param, old, state, group)


def _eps(param: Tensor, group: dict[str, Any]) -> float:
    """The rounding of a step: that of the weight, or of a rate or β that is a tensor."""
    tensors = [
        value for value in (param, group["lr"], *group["betas"]) if isinstance(value, Tensor)
    ]
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _check_move(
    number: int, param: Tensor, old: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    lr, step, eps = float(group["lr"]), float(state["step"]), _eps(param, group)
    beta1, beta2 = map(float, group["betas"])
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double() / (
        1 - beta2**step
    )
    update = state["exp_avg"].double() / (1 - beta1**step) / (square.sqrt() + group["eps"])
    whole = lr * (update + group["weight_decay"] * old.double())
    moved = old.double() - param.double()
    slack = 8 * eps * (old.double().abs().max() + whole.abs().max()) + 1e-30
    if param.dim() < 2:
        off = (moved - whole).abs()
    else:
        off = torch.where(whole > 0, (moved - whole).clamp_min(0) + (-moved).clamp_min(0), 0)
        off += torch.where(whole <= 0, (whole - moved).clamp_min(0) + moved.clamp_min(0), 0)
    if not bool((off <= slack).all()):
        raise Wrong(f"weight {number} moved by {float(off.max()):.2g} more or less than AdamW2 may")
