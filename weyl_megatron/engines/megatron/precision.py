"""Megatron's options that save memory: what its configuration asks for, and what is built instead.

With ``use_precision_aware_optimizer`` FusedAdam keeps float32 masters of bfloat16 weights itself,
and M and V in the dtypes that it is told. Here Megatron keeps the masters, as without the option,
so that its checkpoints are the usual ones; M and V are in those dtypes. With
``optimizer_cpu_offload`` Megatron keeps none: see offload.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...moments import Dtypes

_OPTIONS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")

#: Megatron's field that says whether weights, not masters, are in its parameter groups.
_NO_MASTERS = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"

#: What the configuration must be without ``use_precision_aware_optimizer``.
_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")

_KEPT = (torch.float32, torch.bfloat16)


def refuse(config: Any) -> None:
    """Raise one sentence for a dtype, or a way to offload, that AdamW2 does not have."""
    for key in _OPTIONS:
        if getattr(config, key, False) and not config.use_distributed_optimizer:
            raise ValueError(
                f"AdamW2: use_distributed_optimizer got False beside {key}, it takes True."
            )
    if config.use_precision_aware_optimizer:
        for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(config, key) not in _KEPT:
                raise ValueError(
                    f"AdamW2: {key} got {getattr(config, key)}, it takes torch.float32 or "
                    "torch.bfloat16."
                )
        if config.main_params_dtype != torch.float32:
            raise ValueError(
                f"AdamW2: main_params_dtype got {config.main_params_dtype}, it takes torch.float32."
            )
    if getattr(config, "optimizer_cpu_offload", False):
        fraction = getattr(config, "optimizer_offload_fraction", 1.0)
        if fraction != 1.0:
            raise ValueError(
                f"AdamW2: optimizer_offload_fraction got {fraction!r}, it takes 1.0: a matrix is "
                "stepped on one device."
            )


def refuse_beside_fsdp(config: Any) -> None:
    """Raise one sentence for what Megatron-FSDP's optimizer cannot have: it keeps the masters."""
    if getattr(config, "optimizer_cpu_offload", False):
        raise ValueError(
            "AdamW2: optimizer_cpu_offload got True beside use_megatron_fsdp, it takes False."
        )


def refuse_patched(config: Any) -> None:
    """Raise one sentence for what a patched tree, which builds the wrapper itself, cannot do."""
    for key in _OPTIONS:
        if getattr(config, key, False):
            raise ValueError(
                f"AdamW2: {key} got True in a patched Megatron, it takes False there, or enable() "
                "in an unpatched one."
            )


def moment_dtypes(config: Any) -> Dtypes | None:
    """Return the dtypes of M and V that a configuration asks for, or None."""
    if not config.use_precision_aware_optimizer:
        return None
    return config.exp_avg_dtype, config.exp_avg_sq_dtype


def complete(config: Any, completing: Callable[[Any], None]) -> None:
    """Complete a configuration of AdamW2 by ``completing``, which asks for Transformer Engine's
    FusedAdam where an option is one that only that has.
    """
    asked = {"use_precision_aware_optimizer": config.use_precision_aware_optimizer}
    if config.use_precision_aware_optimizer:
        asked |= {key: getattr(config, key) for key in _DTYPES}
        config.use_precision_aware_optimizer = False
        for key in _DTYPES:
            setattr(config, key, torch.float32)
    try:
        completing(config)
    finally:
        for key, value in asked.items():
            setattr(config, key, value)


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Let Megatron build one Adam for ``config``, on the device, with masters unless these are
    offloaded.
    """
    asked = {key: getattr(config, key, False) for key in _OPTIONS}
    setattr(config, _NO_MASTERS, asked["optimizer_cpu_offload"])
    for key in asked:
        setattr(config, key, False)
    try:
        yield
    finally:
        for key, value in asked.items():
            setattr(config, key, value)
