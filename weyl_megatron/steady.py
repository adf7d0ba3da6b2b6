"""What a step reads of all tensors of a device, checked one by one only where something is not as
it was in the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import Hyper, Stepped
from .kernels.stepped import Form
from .layouts.buffers import Buffer
from .layouts.local import is_on_mesh, local, local_gradient, placements_of
from .moments import Dtypes, freezes
from .state import (
    Counts,
    check_gradient,
    check_placements,
    fit_moments,
    hyper_of,
    in_order_of,
    read_step,
)

#: What was read of several tensors: a list for each thing that is read.
Columns = list[list[Any]]

#: Makes the state of a tensor, of a parameter group, that has none.
Allocate = Callable[[Tensor, dict[str, Any]], None]

#: A tensor of another type may wrap others, and have no memory itself.
_FORM = attrgetter("shape"), attrgetter("dtype"), attrgetter("device"), Tensor.stride, type


def forms_of(tensors: Sequence[Tensor]) -> Columns:
    """Return the form of every tensor."""
    return [list(map(read, tensors)) for read in _FORM]


def ends_of(tensors: Sequence[Tensor]) -> Columns:
    """Return what says, beside a tensor's form, whether its storage reaches to its end.

    Its address does not: storage that is resized twice may lie where it lay, and be smaller.
    """
    sizes = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors))
    return [list(map(Tensor.storage_offset, tensors)), list(sizes)]


class Gathered(NamedTuple):
    """What a step works on besides the weights; nothing of it is kept for longer."""

    stepped: list[Stepped | None]  # G, M and V of every tensor; None: without a gradient
    states: list[dict[str, Any]]  # of those that have a gradient
    steps: list[float]  # how many were made of each of these
    counts: Counts | None  # what holds that number; None: it is to be made


class _Held(NamedTuple):
    """What is held of the tensors that have a gradient, each in its place."""

    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    largest: list[Tensor]  # the largest V so far, of those whose group has amsgrad
    are_on_mesh: bool  # whether moments may be DTensors; gradients are local ones

    def columns(self) -> Columns | None:
        """Return the form and the end of all of them; None where one is missing or sparse."""
        moments = [*self.exp_avg, *self.exp_avg_sq, *self.largest]
        tensors = [*self.grads, *map(local, moments)] if self.are_on_mesh else self.grads + moments
        try:
            spread = placements_of(moments) if self.are_on_mesh else []
            return [*forms_of(tensors), *ends_of(tensors), spread]
        except (AttributeError, TypeError, RuntimeError):
            return None  # what is no tensor, or has no strides, is looked at by itself


class _Passed(NamedTuple):
    """What was read as every tensor was checked; no tensor, which would be kept alive."""

    numbers: list[int]  # of the tensors that had a gradient
    amsgrad: list[int]  # the places among them of those that have the largest V
    freezing: list[bool]  # of the groups, whether V in bfloat16 would stand still
    columns: Columns | None  # None: these cannot be compared
    reordered: list[int]  # the places of gradients in another memory order than their weight


class Members:
    """The tensors that are stepped together on one device, in the layout's order.

    Args:
        buffers: whose tensors they are.
        param_groups: of each.
        forms: of each, as a dense tensor.
        gaps: the numbers of those that are not dense, and are stepped as copies.
    """

    def __init__(
        self,
        buffers: Sequence[Buffer],
        param_groups: Sequence[dict[str, Any]],
        forms: Sequence[Form],
        gaps: Sequence[int],
    ) -> None:
        self.buffers, self.param_groups = list(buffers), list(param_groups)
        self.forms, self.gaps = list(forms), list(gaps)
        self.tensors = [buffer.tensor for buffer in buffers]
        self.groups = list({id(group): group for group in param_groups}.values())  # each once
        places = {id(group): place for place, group in enumerate(self.groups)}
        self._group_of = [places[id(group)] for group in param_groups]
        self.ends: Columns | None = None  # of the weights, as they were checked last
        self._passed: _Passed | None = None
        self._counts: Counts | None = None
        self._are_on_mesh = any(map(is_on_mesh, self.tensors))

    def held(self) -> list[Tensor]:
        """Return what this rank holds of every tensor."""
        return list(map(local, self.tensors)) if self._are_on_mesh else list(self.tensors)

    def gather(
        self,
        weights: Sequence[Tensor],
        state: Mapping[Tensor, dict[str, Any]],
        allocate: Allocate,
        dtypes: Dtypes | None = None,
    ) -> Gathered:
        """Return G, M and V of this step (Algorithm 1, lines 1 and 2), checked, and each in the
        memory order of its weight.

        Args:
            weights: dense, and checked.
            state: the optimizer's; moments in another memory order are replaced there.
            allocate: makes the state of a tensor that has none.
            dtypes: of M and V; None: their weights'.

        Raises:
            ValueError: a gradient or moment is not as its weight, or without memory, or missing.
        """
        given = (
            list(map(local_gradient, self.tensors))
            if self._are_on_mesh
            else [tensor.grad for tensor in self.tensors]
        )
        numbers = [number for number, grad in enumerate(given) if grad is not None]
        grads = [grad for grad in given if grad is not None]
        amsgrad = self._places(numbers, "amsgrad")
        states = [state.get(self.tensors[number], {}) for number in numbers]
        held = self._held(grads, states, amsgrad)
        # Without dtypes moments are kept as their weights, whatever β₂ becomes.
        freezing = [] if dtypes is None else list(map(freezes, self.groups))
        seen, passed = (numbers, amsgrad, freezing, held.columns()), self._passed
        if passed is None or passed.columns is None or passed[:4] != seen:
            self._passed = None
            states = [
                self._checked(number, weights[number], grad, state, allocate, dtypes)
                for number, grad in zip(numbers, grads, strict=True)
            ]
            held = self._held(grads, states, amsgrad)
            strides = [self.forms[number].stride for number in numbers]
            pairs = enumerate(zip(grads, strides, strict=True))
            reordered = [place for place, (grad, stride) in pairs if grad.stride() != stride]
            passed = self._passed = _Passed(*seen[:3], held.columns(), reordered)
        for place in passed.reordered:
            grads[place] = in_order_of(weights[numbers[place]], grads[place])
        self._negate(numbers, grads)
        counts, steps = self._read_steps(numbers, states)
        hypers = self._hypers(numbers, steps)
        largest: list[Tensor | None] = [None] * len(numbers)
        for place, moment in zip(amsgrad, held.largest, strict=True):
            largest[place] = moment
        moments: Columns = [held.exp_avg, held.exp_avg_sq, largest]
        if self._are_on_mesh:
            moments = [list(map(local, column)) for column in moments]
        with_gradient = map(Stepped, grads, *moments[:2], hypers, moments[2])
        stepped: list[Stepped | None] = [None] * len(given)
        for number, each in zip(numbers, with_gradient, strict=True):
            stepped[number] = each
        return Gathered(stepped, states, steps, counts)

    def write_back(self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None]) -> None:
        """Copy what was stepped as a dense copy to where it belongs."""
        for number in self.gaps:
            if stepped[number] is not None:
                self.held()[number].copy_(weights[number])

    def count(self, gathered: Gathered) -> None:
        """Count the step of every tensor that has a gradient."""
        counts = gathered.counts or Counts(gathered.states, gathered.steps)
        counts.count()
        self._counts = counts

    def _checked(
        self,
        number: int,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[Tensor, dict[str, Any]],
        allocate: Allocate,
        dtypes: Dtypes | None,
    ) -> dict[str, Any]:
        """Return the state of one tensor, checked with its gradient."""
        tensor, group = self.tensors[number], self.param_groups[number]
        form, name = self.forms[number], self.buffers[number].name
        others = set(dtypes or ()) - {form.dtype}
        if self.buffers[number].swapped is not None and others:
            raise ValueError(  # files have room for numbers of the weight's dtype
                f"AdamW2: state_dtype got {others.pop()} for what begins with parameter '{name}' "
                f"and is in a file between steps, it takes its dtype, {form.dtype}."
            )
        allocate(tensor, group)
        check_gradient(grad, form, name)
        if self._are_on_mesh:
            check_placements(state[tensor], tensor, group, name)
        fit_moments(state[tensor], weight, form, group, name, dtypes)
        return state[tensor]

    def _held(
        self, grads: list[Tensor], states: Sequence[Mapping[str, Any]], amsgrad: Sequence[int]
    ) -> _Held:
        """Return what states hold, None in the places of what they do not."""
        missing: Any = None
        return _Held(
            grads,
            [state.get("exp_avg", missing) for state in states],
            [state.get("exp_avg_sq", missing) for state in states],
            [states[place].get("max_exp_avg_sq", missing) for place in amsgrad],
            self._are_on_mesh,
        )

    def _places(self, numbers: Sequence[int], flag: str) -> list[int]:
        """Return the places in ``numbers`` of tensors whose parameter group has a flag."""
        if not any(group[flag] for group in self.groups):
            return []
        return [place for place, n in enumerate(numbers) if self.param_groups[n][flag]]

    def _negate(self, numbers: Sequence[int], grads: list[Tensor]) -> None:
        """Put −G in the place of the gradients that are gone up, not down."""
        places = self._places(numbers, "maximize")
        if places:
            negated = torch._foreach_neg([grads[place] for place in places])
            for place, grad in zip(places, negated, strict=True):
                grads[place] = grad

    def _read_steps(
        self, numbers: Sequence[int], states: Sequence[dict[str, Any]]
    ) -> tuple[Counts | None, list[float]]:
        """Return how many steps were made of the tensors, and what holds that."""
        steps = None if self._counts is None else self._counts.read(states)
        if steps is not None:
            return self._counts, steps
        return None, [
            read_step(state, self.param_groups[number], self.buffers[number].name)
            for number, state in zip(numbers, states, strict=True)
        ]

    def _hypers(self, numbers: Sequence[int], steps: Sequence[float]) -> list[Hyper]:
        """Return the hyperparameters of every tensor, one object for those that have them alike."""
        keys = list(zip([self._group_of[number] for number in numbers], steps, strict=True))
        hypers = {key: hyper_of(self.groups[key[0]], key[1]) for key in dict.fromkeys(keys)}
        return [hypers[key] for key in keys]
