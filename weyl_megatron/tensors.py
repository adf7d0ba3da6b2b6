"""The tensors that an optimizer steps, as they were when it was read what lies in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from .kernels.stepped import Form, check_memory, extent_of, form_of, has_form
from .layouts.buffers import Buffer
from .layouts.plain import dense, is_frozen

ParamGroups = Sequence[dict[str, Any]]


class SteppedTensors:
    """What lies where in the tensors that are stepped, and whether that is still so.

    Args:
        buffers: every tensor that is ever stepped, in an order that the ranks share.
        are_parameters: whether they are the model's own parameters, which users may freeze, add,
            reshape and move between steps.
    """

    def __init__(self, buffers: Sequence[Buffer], *, are_parameters: bool) -> None:
        self._are_parameters = are_parameters
        self._buffers = {id(buffer.tensor): buffer for buffer in buffers}
        self._forms = {number: form_of(buffer.tensor) for number, buffer in self._buffers.items()}
        # Of an engine's tensors kernels take all elements in a row; of others a copy is made where
        # they do not lie so.
        self._extents = {
            number: extent_of(form) if are_parameters else prod(form.shape)
            for number, form in self._forms.items()
        }

    def have_changed(self, param_groups: ParamGroups, *, share_a_budget: bool) -> bool:
        """Whether a tensor came, or has another shape, dtype, device or memory order than before.

        Args:
            param_groups: the optimizer's, as they are now.
            share_a_budget: whether a parameter that is frozen or thawed changes the others' τ.
        """
        if not all(has_form(buffer.tensor, form) for buffer, form in self._with_forms()):
            return True
        if not self._are_parameters:
            return False
        if share_a_budget and any(map(_was_thawed_or_frozen, self._buffers.values())):
            return True
        return any(
            id(tensor) not in self._buffers and tensor.grad is not None
            for tensor in _tensors(param_groups)
        )

    def in_groups(self, param_groups: ParamGroups) -> list[Buffer]:
        """Return the buffers whose tensors are in the parameter groups, in the groups' order."""
        numbers = map(id, _tensors(param_groups))
        return [self._buffers[number] for number in numbers if number in self._buffers]

    def by_device(
        self, param_groups: ParamGroups
    ) -> dict[torch.device, list[tuple[Buffer, dict[str, Any]]]]:
        """Return, per device, the buffers that are stepped now, each with its parameter group.

        They are in the layout's order, which ranks share that hold, and list, different pieces.

        Raises:
            ValueError: an engine's parameter groups have a tensor that its layout does not have.
        """
        group_of = {
            id(tensor): group
            for group in param_groups
            for tensor in group["params"]
            if tensor.requires_grad or tensor.grad is not None
        }
        if not self._are_parameters and not group_of.keys() <= self._buffers.keys():
            names = (buffer.name for buffer in self._buffers.values())
            raise ValueError(
                "AdamW2: the engine steps a tensor that its layout does not have, beside parameter "
                f"'{next(names, '')}'."
            )
        devices: dict[torch.device, list[tuple[Buffer, dict[str, Any]]]] = {}
        for number, buffer in self._buffers.items():
            group = group_of.get(number)
            if group is None and buffer.param_group is not None:
                group = param_groups[buffer.param_group]
            if group is not None:
                devices.setdefault(buffer.tensor.device, []).append((buffer, group))
        return devices

    def weight(self, buffer: Buffer) -> tuple[Tensor, Form]:
        """Return what a buffer holds as a dense tensor, and that tensor's form.

        Raises:
            ValueError: its storage ends before its elements do.
        """
        tensor, number = buffer.tensor, id(buffer.tensor)
        # Its form was compared in this step.
        check_memory(tensor, self._extents[number], "the weight", buffer.name)
        weight = dense(tensor) if self._are_parameters else tensor
        return weight, self._forms[number] if weight is tensor else form_of(weight)

    def _with_forms(self) -> Iterator[tuple[Buffer, Form]]:
        return zip(self._buffers.values(), self._forms.values(), strict=True)


def _tensors(param_groups: ParamGroups) -> Iterator[Tensor]:
    return (tensor for group in param_groups for tensor in group["params"])


def _was_thawed_or_frozen(buffer: Buffer) -> bool:
    return is_frozen(buffer.tensor) != buffer.shards[0].parameter.is_frozen


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, whichever its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def refuse_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError, as torch's optimizers do, where a CUDA graph is captured: counts would
    freeze.
    """
    # The old name warns.
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return
