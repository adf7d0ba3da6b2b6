"""What a kernel is given of one tensor in one step, and what has to be so before it goes by addresses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weyl_megatron.layouts.plain import storage_order


class Hyper(NamedTuple):
    """The hyperparameters of one tensor's parameter group at step t.

    Rate and betas may be tensors of one element, as torch.optim.AdamW takes them; plain torch then
    rounds as it does there.
    """

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    step: float

    @property
    def correction1(self) -> float | Tensor:
        """1 − β₁ᵗ."""
        return 1.0 - self.beta1**self.step

    @property
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
    """G, M and V of one tensor, laid out in memory as it is."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    hyper: Hyper
    max_exp_avg_sq: Tensor | None = None  # the largest V so far, which takes its place (amsgrad)


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


def check_form(tensor: Tensor, form: Form, what: str) -> None:
    """Raise ValueError where a tensor is of another form than the weight it belongs to, or has no memory.

    Args:
        tensor: a gradient or moment.
        form: the weight's.
        what: the tensor and its parameter, for the sentence.
    """
    if (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) != form:
        raise ValueError(f"AdamW2: {what} is {form_of(tensor)}, it takes its parameter's {form}.")
    check_memory(tensor, what)


def check_memory(tensor: Tensor, what: str) -> None:
    """Raise ValueError where a tensor's storage ends before its last element, as after ``resize_(0)``."""
    held = tensor.untyped_storage().nbytes()
    if tensor.is_contiguous():
        last = tensor.numel() - 1
    else:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if held < end and tensor.numel():
        raise ValueError(
            f"AdamW2: {what} of shape {tuple(tensor.shape)} got a storage of {held} bytes, it takes {end}."
        )
