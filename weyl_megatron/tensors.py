"""The tensors that an optimizer steps, as they were when it was read what lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.stepped import Form, check_memory, extent_of, form_of
from .layouts.buffers import Buffer
from .layouts.local import is_on_mesh, local
from .layouts.plain import dense, is_dense, is_frozen
from .state import are_same
from .steady import Members, ends_of, forms_of

ParamGroups = Sequence[dict[str, Any]]


class _Listed(NamedTuple):
    """What parameter groups list."""

    tensors: list[Tensor]
    buffers: list[Buffer]  # of those that the layout has
    others: list[Tensor]  # that it does not have


class _Stepped(NamedTuple):
    """What is stepped, and of what that holds."""

    listed: _Listed
    groups: list[dict[str, Any]]
    sizes: list[int]  # of the groups
    chosen: list[bool]  # of each tensor listed, whether it is stepped
    members: dict[torch.device, Members]


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
        self._tensors = [buffer.tensor for buffer in self._buffers.values()]
        swapped = [buffer.tensor for buffer in self._buffers.values() if buffer.swapped is not None]
        #: whether an engine takes the elements of some of them away between steps
        self._are_swapped = bool(swapped)
        self._swapped, self._swapped_kinds = swapped, _kinds(swapped)
        #: whether some of them are DTensors, of which a rank holds a piece
        self.are_on_mesh = any(map(is_on_mesh, self._tensors))
        self._forms = forms_of(self._held())
        self._were_frozen = [
            are_parameters and buffer.shards[0].parameter.is_frozen
            for buffer in self._buffers.values()
        ]
        self._listed = _Listed([], [], [])
        self._stepped: _Stepped | None = None

    def have_changed(self, param_groups: ParamGroups, *, share_a_budget: bool) -> bool:
        """Whether a tensor came, or has another shape, dtype, device or memory order than before.

        Args:
            param_groups: the optimizer's, as they are now.
            share_a_budget: whether a parameter that is frozen or thawed changes the others' τ.
        """
        if forms_of(self._held()) != self._forms or _kinds(self._swapped) != self._swapped_kinds:
            return True
        if not self._are_parameters:
            return False
        if share_a_budget and list(map(is_frozen, self._tensors)) != self._were_frozen:
            return True
        return any(tensor.grad is not None for tensor in self._list(param_groups).others)

    def _held(self) -> list[Tensor]:
        if self._are_swapped:
            kept = (buffer for buffer in self._buffers.values() if buffer.swapped is None)
            return [local(buffer.tensor) for buffer in kept]
        return list(map(local, self._tensors)) if self.are_on_mesh else self._tensors

    def in_groups(self, param_groups: ParamGroups) -> list[Buffer]:
        """Return the buffers whose tensors are in the parameter groups, in the groups' order."""
        return self._list(param_groups).buffers

    def by_device(self, param_groups: ParamGroups) -> dict[torch.device, Members]:
        """Return, per device, what is stepped now, each tensor with its parameter group.

        They are in the layout's order, which ranks share that hold, and list, different pieces.

        Raises:
            ValueError: an engine's parameter groups have a tensor that its layout does not have, or
                one without the elements that are to be stepped.
        """
        listed, last = self._list(param_groups), self._stepped
        sizes = [len(group["params"]) for group in param_groups]
        chosen = [tensor.requires_grad or tensor.grad is not None for tensor in listed.tensors]
        if (
            last is None
            or self._are_swapped  # their forms are read in every step
            or last.listed is not listed
            or not are_same(last.groups, param_groups)
            or (last.sizes, last.chosen) != (sizes, chosen)
        ):
            members = self._members(param_groups)
            last = self._stepped = _Stepped(listed, list(param_groups), sizes, chosen, members)
        return last.members

    def weights(self, members: Members) -> list[Tensor]:
        """Return what lies in the members' tensors as dense ones.

        Raises:
            ValueError: the storage of one ends before its elements do.
        """
        weights = members.held()
        ends = ends_of(weights)
        if ends != members.ends:  # their forms were compared in this step
            for weight, buffer in zip(weights, members.buffers, strict=True):
                form = form_of(weight)
                # Of an engine's tensors kernels take all elements in a row.
                extent = extent_of(form) if self._are_parameters else prod(form.shape)
                check_memory(weight, extent, "the weight", buffer.name)
            members.ends = ends
        for number in members.gaps:
            weights[number] = dense(weights[number])
        return weights

    def _list(self, param_groups: ParamGroups) -> _Listed:
        """Return what parameter groups list; the same object where that is the same."""
        tensors = [tensor for group in param_groups for tensor in group["params"]]
        if not are_same(tensors, self._listed.tensors):
            numbers = list(map(id, tensors))
            buffers = [self._buffers[number] for number in numbers if number in self._buffers]
            others = [tensor for tensor in tensors if id(tensor) not in self._buffers]
            self._listed = _Listed(tensors, buffers, others)
        return self._listed

    def _members(self, param_groups: ParamGroups) -> dict[torch.device, Members]:
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
        return {device: self._members_of(pairs) for device, pairs in devices.items()}

    def _members_of(self, pairs: Sequence[tuple[Buffer, dict[str, Any]]]) -> Members:
        buffers, groups = [buffer for buffer, _ in pairs], [group for _, group in pairs]
        held = [local(buffer.tensor) for buffer in buffers]
        for buffer in buffers:
            if buffer.swapped is not None and buffer.tensor.numel() != buffer.swapped:
                raise ValueError(
                    f"AdamW2: the tensor from parameter '{buffer.name}' on got "
                    f"{buffer.tensor.numel()} elements in a step, it takes {buffer.swapped}."
                )
        forms = list(map(form_of, held))
        gaps = []
        # An engine's tensors are taken as they are.
        if self._are_parameters:
            gaps = [number for number, tensor in enumerate(held) if not is_dense(tensor)]
        for number in gaps:
            forms[number] = _contiguous(forms[number])
        return Members(buffers, groups, forms, gaps)


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, torch.device]]:
    """Return what tensors keep while their elements are elsewhere."""
    return [(tensor.dtype, tensor.device) for tensor in tensors]


def _contiguous(form: Form) -> Form:
    """Return the form of a contiguous tensor of the same shape."""
    return form._replace(stride=torch.empty(form.shape, device="meta").stride())


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
