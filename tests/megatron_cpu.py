"""Lets the real megatron-core run on CPU and gloo: ``install()`` before process groups and models
are built.

megatron-core asks for CUDA by name in a few dozen places (current device, streams, factories,
tensor type strings, generator states). Here each of them is answered from the CPU; what is
computed, and how it is spread, stays Megatron's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


class _NoStream:
    """Stands in for a CUDA stream or event: on the CPU everything is in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: _NoStream()

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *args: Any) -> bool:
        return False


@functools.cache
def install() -> None:
    """Answer megatron-core's calls to CUDA from the CPU, in this process; once."""
    _devices()
    _streams()
    _generators()
    _factories()
    _moves()
    _type_names()
    _all_to_all()
    _norms()
    _router()
    _fsdp()


def _devices() -> None:
    torch.cuda.current_device = lambda: CPU
    for name in ("synchronize", "empty_cache", "set_device"):
        # Distinct functions: torch's dynamo refuses aliases in its table of rules.
        setattr(torch.cuda, name, (lambda: lambda *args, **kwargs: None)())


def _streams() -> None:
    torch.cuda.Stream = _NoStream
    torch.cuda.Event = type("_NoEvent", (_NoStream,), {})
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()
    torch.cuda.default_stream = lambda *args, **kwargs: _NoStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None


def _generators() -> None:
    import megatron.core.tensor_parallel.random as random

    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )


def _factories() -> None:
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def _moves() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    to = torch.Tensor.to

    def on_cpu(target: Any) -> Any:
        return (
            CPU
            if isinstance(target, (str, torch.device)) and str(target).startswith("cuda")
            else target
        )

    torch.Tensor.to = lambda self, *args, **kwargs: to(
        self, *map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()}
    )


def _type_names() -> None:
    original = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare with 'torch.cuda.FloatTensor'.
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        name = original(self)
        return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_


def _all_to_all() -> None:
    original = dist.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return (
            sizes.tolist() if hasattr(sizes, "tolist") else sizes
        )  # on CUDA they become lists on the way to the host

    dist.all_to_all_single = (
        lambda output, input, output_split_sizes=None, input_split_sizes=None, **kwargs: original(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs
        )
    )


def _norms() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # apex's and Transformer Engine's norms, which need a GPU, mark their parameters under
        # sequence parallelism.
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        norm = original(cls, config, *args, **kwargs)
        config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def _router() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16 asks for it where Transformer Engine is not installed, too
        moe_utils.te_general_gemm = None


def _fsdp() -> None:
    try:
        from megatron.core.distributed.fsdp import mcore_fsdp_adapter
        from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp
    except ImportError:  # megatron-core before 0.15
        return
    # Both write the current device behind CUDA's name.
    on_cpu = ModuleType("torch")
    on_cpu.__dict__.update(vars(torch), device=lambda *_: CPU, __getattr__=partial(getattr, torch))
    megatron_fsdp.torch = mcore_fsdp_adapter.torch = on_cpu
    # It asks whether a layer is of Transformer Engine, where that is not installed, too.
    if not isinstance(getattr(mcore_fsdp_adapter, "TELinear", None), type):
        mcore_fsdp_adapter.TELinear = type("TELinear", (), {})
