"""A tensor that keeps its numbers in another one, as torchao's weights do that FSDP2 gathers in
float8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

#: What keeps the wrapper.
_KEPT = {getattr(torch.ops.aten, name) for name in ("detach", "clone", "view", "alias", "view_as")}


class Wrapped(Tensor):
    """Wraps a tensor."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> Wrapped:
        wrapped: Wrapped = Tensor._make_wrapper_subclass(
            cls,
            content.size(),
            strides=content.stride(),
            dtype=content.dtype,
            device=content.device,
            requires_grad=content.requires_grad,
        )
        wrapped.content = content
        return wrapped

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["content"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Wrapped:
        return Wrapped(inner["content"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map_only(cls, lambda t: t.content, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return Wrapped(result) if func.overloadpacket in _KEPT else result
