"""Ranks as threads of one process, whose process groups really sum: as many layouts a second as no launcher makes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from weyl_megatron.spectral import collectives

T = TypeVar("T")

_here = threading.local()


class Group:
    """A process group of the threads ``ranks``; every member gets the same bits, as from a real one."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self.barrier = threading.Barrier(len(self.ranks), timeout=60)
        self._given: list[Tensor] = [torch.empty(0)] * len(self.ranks)

    def all_reduce(self, tensor: Tensor) -> None:
        self._given[self.ranks.index(_here.rank)] = tensor
        self.barrier.wait()
        given = [(len(each), each.dtype) for each in self._given]
        assert len(set(given)) == 1, f"collectives diverge: ranks sum {given}"
        total = torch.stack(self._given).sum(0)
        self.barrier.wait()  # all have read
        tensor.copy_(total)
        self.barrier.wait()


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
            results[rank] = run(rank)
        except BaseException as error:
            errors.append(error)
            for group in groups:  # those who wait for this rank
                group.barrier.abort()

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(1, world)]
    for thread in threads:
        thread.start()
    of_rank(0)
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return results
