"""What a kernel is given of one tensor in one step, and what has to be so before it goes by
addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts.plain import lacks_memory, storage_order


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of a parameter group at step t, shared by its tensors that made as many.

    Rate and betas may be tensors of one element, as torch.optim.AdamW takes them; plain torch then
    rounds as it does there.
    """

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    step: float

    @cached_property
    def correction1(self) -> float | Tensor:
        """1 − β₁ᵗ."""
        return 1.0 - self.beta1**self.step

    @cached_property
    def correction2(self) -> float | Tensor:
        """1 − β₂ᵗ."""
        return 1.0 - self.beta2**self.step

    def numbers(self) -> Numbers:
        """Return rate, betas and corrections as numbers, for a compiled kernel."""
        lr, beta1, beta2 = float(self.lr), float(self.beta1), float(self.beta2)
        corrections = 1.0 - beta1**self.step, 1.0 - beta2**self.step
        return Numbers(lr, beta1, beta2, self.eps, self.weight_decay, *corrections)


class Numbers(NamedTuple):
    """Hyperparameters without tensors."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correction1: float
    correction2: float


class Stepped(NamedTuple):
    """G, M and V of one tensor, laid out in memory as it is; G may be bf16 or fp16 beside fp32."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Hyper
    max_exp_avg_sq: Tensor | None = None  # the largest V so far, which takes its place (amsgrad)

    def in_dtype(self, dtype: torch.dtype) -> Stepped:
        """Return this with a gradient of a dtype, for a kernel that reads no other."""
        return self if self.grad.dtype == dtype else self._replace(grad=self.grad.to(dtype))


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory."""
    return tensor.detach().permute(storage_order(tensor)).view(-1)


class Form(NamedTuple):
    """What of W, G, M and V has to be alike before a kernel is handed their addresses."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    def __str__(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}, on {self.device}"


def form_of(tensor: Tensor) -> Form:
    """Return the form of a tensor."""
    return Form(tensor.shape, tensor.dtype, tensor.device, tensor.stride())


def extent_of(form: Form) -> int:
    """Return from the first to behind the last of a tensor's elements in memory, in elements."""
    steps = (size - 1 for size in form.shape)
    return 0 if 0 in form.shape else 1 + sum(map(mul, steps, form.stride))


def has_form(tensor: Tensor, form: Form) -> bool:
    """Whether a tensor is of a form."""
    return (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == form


def check_form(tensor: Tensor, form: Form, extent: int, what: str, name: str) -> None:
    """Check that a kernel may go by a tensor's address: its form is ``form``, and its storage
    reaches to its end.

    Args:
        tensor: G, M or V.
        form: the weight's, as the layout knows it.
        extent: of that form.
        what: G, M or V, for the sentence.
        name: of the parameter, likewise.

    Raises:
        ValueError: it is of another form, or without memory.
    """
    if not has_form(tensor, form):
        raise ValueError(
            f"AdamW2: {what} of parameter '{name}' is {form_of(tensor)}, it takes its parameter's "
            f"{form}."
        )
    check_memory(tensor, extent, what, name)


def check_memory(tensor: Tensor, extent: int, what: str, name: str) -> None:
    """Raise ValueError where a tensor's storage ends before its ``extent`` elements do, as after
    ``resize_(0)``, or is other tensors'.
    """
    if lacks_memory(tensor):
        raise ValueError(
            f"AdamW2: {what} of parameter '{name}' is a {type(tensor).__name__}, whose memory "
            "other tensors have, it takes a plain tensor."
        )
    end = (tensor.storage_offset() + extent) * tensor.itemsize
    held = tensor.untyped_storage().nbytes()
    if held < end and extent:
        raise ValueError(
            f"AdamW2: {what} of parameter '{name}', of shape {tuple(tensor.shape)}, got a storage "
            f"of {held} bytes, it takes {end}."
        )
