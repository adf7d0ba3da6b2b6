"""Ranks as threads of one process, whose process groups really sum: as many layouts a second as no
launcher makes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from weyl_megatron.spectral import collectives

T = TypeVar("T")

_here = threading.local()

#: Held by the rank that computes: every operation of torch lets the interpreter go, and threads
#: that compute at once spend their time taking it from each other.
_turn = threading.Lock()

#: Kept: what torch sets up for a new thread takes longer than a case. No case has more than 8
#: ranks.
_pool = ThreadPoolExecutor(7)


class Group:
    """A process group of the threads ``ranks``; every member gets the same bits, as from a real
    one.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.barrier = threading.Barrier(len(self.ranks), timeout=600)
        self._given: list[Tensor] = [torch.empty(0)] * len(self.ranks)

    def all_reduce(self, tensor: Tensor) -> None:
        self._given[self.ranks.index(_here.rank)] = tensor
        self._wait()
        given = [(len(each), each.dtype) for each in self._given]
        assert len(set(given)) == 1, f"collectives diverge: ranks sum {given}"
        total = torch.stack(self._given).sum(0)
        self._wait()  # all have read, and none reads again before the next sum
        tensor.copy_(total)

    def _wait(self) -> None:
        _turn.release()
        try:
            self.barrier.wait()
        finally:
            _turn.acquire()


@contextmanager
def summing_groups() -> Iterator[None]:
    """Let the collectives of AdamW2 sum over :class:`Group`."""

    def all_reduce(tensor: Tensor, group: Group, async_op: bool) -> Any:
        assert async_op
        group.all_reduce(tensor)
        return SimpleNamespace(wait=lambda: None)

    stand_in = SimpleNamespace(get_backend=lambda group: "gloo", all_reduce=all_reduce)
    with patch.object(collectives, "dist", stand_in):
        yield


def on_ranks(world: int, groups: Sequence[Group], run: Callable[[int], T]) -> list[T]:
    """Return what ``run`` returned on every rank; raise what the first rank that failed raised."""
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def of_rank(rank: int) -> None:
        _here.rank = rank
        try:
            with _turn:
                results[rank] = run(rank)
        except BaseException as error:
            errors.append(error)
            for group in groups:  # those who wait for this rank
                group.barrier.abort()

    others = [_pool.submit(of_rank, rank) for rank in range(1, world)]
    of_rank(0)
    wait(others)
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return results
