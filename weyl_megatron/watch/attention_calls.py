"""Queries and keys on their way into ``scaled_dot_product_attention``, by whatever module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..layouts.local import local


class AttentionCalls(TorchFunctionMode):
    """Sees every call of scaled_dot_product_attention while it is entered."""

    def __init__(self, seen: Callable[[Tensor, Tensor, Tensor | None, bool, float], None]) -> None:
        super().__init__()
        self._seen, self._is_paused = seen, False

    def paused(self) -> Pause:
        return Pause(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self._is_paused:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            q, k, mask = given["query"], given["key"], given.get("attn_mask")
            is_causal, scale = bool(given.get("is_causal", False)), given.get("scale")
            scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
            self._seen(q, k, mask, is_causal, scale)
        return func(*args, **kwargs)


class Pause:
    """Sees no calls while it is entered."""

    def __init__(self, mode: AttentionCalls) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._mode._is_paused = True

    def __exit__(self, *_: Any) -> None:
        self._mode._is_paused = False


def heads_here(x: Any) -> Tensor:
    """Return what this rank has of queries or keys on a mesh, (batch, heads, tokens, d)."""
    placement = x.placements[-1]
    is_by_head = placement.is_shard() and placement.dim % x.dim() == 1
    if x.device_mesh.ndim > 1 or not (is_by_head or placement.is_replicate()):
        raise ValueError(
            f"watch: queries or keys got the placements {x.placements}, they take Replicate and "
            "Shard(1), over heads."
        )
    held: Tensor = local(x)
    return held
