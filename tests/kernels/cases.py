"""Layouts that ranks have pieces of, and optimizers that step them: in threads, or in processes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.faults.threads import Group, on_ranks, summing_groups
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard, Spread

T = TypeVar("T")

#: Of weights and moments of a few steps, over the largest of a tensor: sums in another order, and
#: Adam's division by √V, which is small where gradients happened to be.
ROUNDING = 2e-6

OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1, "tau": 0.02}


class Case(NamedTuple):
    """Parameters that lie in a row, which ranks have cut into pieces."""

    shapes: dict[str, tuple[int, ...]]
    cuts: tuple[float, ...] = ()  # between ranks, as shares of all elements
    gap: int = 0  # elements before a piece, which nobody steps
    overrides: tuple[dict[str, Any], ...] = ()
    tied: tuple[int, int] | None = None  # the shape of a matrix that every rank has a copy of
    still: tuple[int, ...] | None = None  # of one beside the row, without a gradient

    @property
    def total(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def edges(self) -> list[int]:
        return [0, *sorted(int(cut * self.total) for cut in self.cuts), self.total]

    def shards(self, rank: int) -> tuple[Shard, ...]:
        """Return what of which parameter a rank has: all are listed, of some it has nothing."""
        start, stop = self.edges[rank : rank + 2]
        shards: list[Shard] = []
        at = 0
        for name, shape in self.shapes.items():
            size = prod(shape)
            first = min(max(start, at), at + size)
            last = max(first, min(stop, at + size))
            shards.append(Shard(Parameter(name, shape), first - at, last - at, first - start))
            at += size
        return tuple(shards)


class State(NamedTuple):
    """What a rank has after a step."""

    tensors: list[Tensor]  # W, M and V of every tensor, and what lies before W
    stats: dict[str, MatrixStats]
    rate: float


class Rank:
    """An optimizer of what a rank has, and the gradients of its steps."""

    def __init__(self, case: Case, rank: int, group: Any, **options: Any) -> None:
        self.case, self.range = case, slice(*case.edges[rank : rank + 2])
        self.generator = torch.Generator().manual_seed(0)
        row = (torch.randn(case.total, generator=self.generator) * 0.05)[self.range]
        self.memory = torch.full((case.gap + len(row),), 7.0)
        self.memory[case.gap :] = row
        self.params = [nn.Parameter(self.memory[case.gap :])]
        groups = (group,) if case.cuts else ()
        buffers = [Buffer(self.params[0], case.shards(rank), groups)]
        if case.tied is not None:
            copies = (Spread(group, rank, is_copied=True),) if case.cuts else ()
            buffers.append(self._beside("tied", case.tied, copies))
        if case.still is not None:
            buffers.append(self._beside("still", case.still))
        self.optimizer = AdamW2(
            self.params, **{**OPTIONS, "overrides": list(case.overrides), **options}
        )
        self.optimizer.engine = GivenLayout(lambda: Layout(buffers))
        self.grads = self._gradients()

    def _beside(self, name: str, shape: tuple[int, ...], copies: tuple[Spread, ...] = ()) -> Buffer:
        tensor = nn.Parameter(torch.randn(shape, generator=self.generator) * 0.05)
        self.params.append(tensor)
        parameter = Parameter(name, shape, spreads=copies)
        return Buffer(tensor, (Shard(parameter, 0, tensor.numel(), 0),))

    def _gradients(self) -> list[Tensor]:
        whole = torch.randn(self.case.total, generator=self.generator)
        others = [torch.randn(p.shape, generator=self.generator) for p in self.params[1:]]
        return [whole[self.range], *others]

    def step(self, lr: float, sign: float = 0.0) -> State:
        """Step at a rate, with new gradients or, where ``sign`` is not 0, with the last ones."""
        if sign:
            self.grads = [sign * grad for grad in self.grads]
        else:
            self.grads = self._gradients()
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad.clone()
        if self.case.still is not None:
            self.params[-1].grad = None
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        states = (self.optimizer.state.get(param, {}) for param in self.params)
        moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq") if state]
        tensors = [self.memory, *(param.detach() for param in self.params), *moments]
        return State([tensor.clone() for tensor in tensors], self.optimizer.stats(), lr)


def on_every_rank(case: Case, kernel: str, run: Callable[[Rank], T], **options: Any) -> list[T]:
    """Return what ``run`` returns on every rank of a case, whose optimizers have a kernel."""
    world = len(case.cuts) + 1
    group = Group(range(world))
    with patch.dict("os.environ", {VARIABLE: kernel}):
        if world == 1:
            return [run(Rank(case, 0, None, **options))]
        with summing_groups():
            return on_ranks(world, [group], lambda rank: run(Rank(case, rank, group, **options)))


def check_alike(state: State, expected: State, rounding: float = ROUNDING) -> None:
    for tensor, other in zip(state.tensors, expected.tensors, strict=True):
        scale = float(other.abs().max()) if len(other) else 0.0
        assert torch.allclose(tensor, other, rtol=0, atol=rounding * scale, equal_nan=True)
    assert state.stats.keys() == expected.stats.keys()
    for name, entry in state.stats.items():
        other_entry = expected.stats[name]
        assert entry.clipped == other_entry.clipped and entry.certified == other_entry.certified
        assert tuple(entry)[:3] == pytest.approx(
            tuple(other_entry)[:3], rel=tolerances.ROUNDING, nan_ok=True
        ), name
