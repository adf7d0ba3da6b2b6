"""FSDP2 of whichever torch is installed, on CPU and gloo.

torch 2.9 and newer run it so. Older ones lack a few things, which are stood in for here, each where
it is lacking and nowhere else. What is computed, and how it is spread, stays torch's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from torch.distributed import fsdp as _fsdp
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    _PACKAGE = "torch.distributed.fsdp._fully_shard"
except ImportError:  # torch 2.5
    from torch.distributed._composable import fsdp as _fsdp
    from torch.distributed._composable.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    _PACKAGE = "torch.distributed._composable.fsdp"

__all__ = ["UNEVEN", "CPUOffloadPolicy", "MixedPrecisionPolicy", "fully_shard", "lacking"]

SUM, MEAN = dist.ReduceOp.SUM, dist.ReduceOp.AVG

#: What torch before 2.8 says of FSDP2 over tensor parallelism whose bands do not divide.
UNEVEN = "FSDP+TP sharding does not support uneven sharding for now"


def fully_shard(module: nn.Module, **options: Any) -> nn.Module:
    """Return torch's ``fully_shard(module, **options)``; the first one is collective."""
    _stand_in()
    sharded: nn.Module = _fsdp.fully_shard(module, **options)
    return sharded


def lacking(*options: str, uneven: bool = False) -> str | None:
    """Return the sentence of this torch's FSDP2 where it does not do something, or None.

    Args:
        options: of ``fully_shard``.
        uneven: whether it shards what tensor parallelism has cut, and that does not divide.
    """
    taken = inspect.signature(_fsdp.fully_shard).parameters
    for option in options:
        if option not in taken:
            return f"got an unexpected keyword argument '{option}'"
    return UNEVEN if uneven and UNEVEN in inspect.getsource(_part("_fsdp_param")) else None


@functools.cache
def _stand_in() -> None:
    _devices()
    _versions()
    _means()


def _part(name: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGE}.{name}")


class _TorchOfTheCPU:
    """torch, whose ``cuda`` is ``torch.cpu``."""

    cuda = torch.cpu

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _devices() -> None:
    """torch 2.5: FSDP2's modules ask ``torch.cuda`` for streams, by name."""
    if "FSDP requires CUDA for streams" in inspect.getsource(_part("_fsdp_param_group")):
        for name in ("_fsdp_collectives", "_fsdp_param_group", "_fsdp_state"):
            _part(name).torch = _TorchOfTheCPU()
    if not hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6, too
        _events()


def _events() -> None:
    """On the CPU everything is in order: an event has happened."""
    torch.cpu.Stream.record_event = lambda self, event=None: torch.cpu.Event()
    torch.cpu.Stream.wait_event = lambda self, event: None


def _versions() -> None:
    """torch 2.5 and 2.6: on the CPU, gathering a weight for backward counts as a change of it, and
    autograd refuses weights that have changed since forward. torch 2.7 hides it so, too.
    """
    collectives, group = _part("_fsdp_collectives"), _part("_fsdp_param_group")
    copy_out = collectives.foreach_all_gather_copy_out
    if "_unsafe_preserve_version_counter" in inspect.getsource(copy_out):
        return

    def unchanged(result: Any, params: Any, *args: Any) -> None:
        held = [tensor for param in params for tensor in param.all_gather_outputs]
        versions = [tensor._version for tensor in held]
        copy_out(result, params, *args)
        for tensor, version in zip(held, versions, strict=True):
            torch._C._autograd._unsafe_set_version_counter(tensor, version)

    group.foreach_all_gather_copy_out = unchanged


def _means() -> None:
    """FSDP2 asks for means. gloo of torch 2.8 and older gives sums in ``reduce_scatter_tensor`` and
    says nothing; that of 2.7 and older refuses ``all_reduce``, for which HSDP wants an event, too.
    """
    reduce, scatter = dist.all_reduce, dist.reduce_scatter_tensor

    def all_reduce(tensor: Tensor, op: Any = SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != MEAN:
            return reduce(tensor, op, group, async_op)
        reduce(tensor, SUM, group)
        return tensor.div_(dist.get_world_size(group))

    def reduce_scatter_tensor(
        output: Tensor, input: Tensor, op: Any = SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != MEAN:
            return scatter(output, input, op, group, async_op)
        scatter(output, input, SUM, group)
        return output.div_(dist.get_world_size(group))

    if not _is_mean(lambda ones, piece: reduce(piece, MEAN)):
        dist.all_reduce = all_reduce
        _events()
    if not _is_mean(lambda ones, piece: scatter(piece, ones, MEAN)):
        dist.reduce_scatter_tensor = reduce_scatter_tensor


def _is_mean(collective: Callable[[Tensor, Tensor], Any]) -> bool:
    """Return whether the mean of ones is one. Collective over all ranks."""
    piece = torch.ones(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.14 has another name for one of them
            collective(torch.ones(dist.get_world_size()), piece)
    except RuntimeError as error:
        if "Cannot use ReduceOp.AVG with Gloo" in str(error):
            return False
        raise
    return piece.item() == 1
