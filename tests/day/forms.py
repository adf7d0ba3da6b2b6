"""Forms that gradients, weights and moments may take on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def noise(shape: Any, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every world."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(dtype)


def reversed_dims(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


def transposed(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    return reversed_dims(noise(shape[::-1], seed, dtype))


def strided(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    whole = torch.full((*shape, 2), float("nan"), dtype=dtype)
    whole[..., 0] = noise(shape, seed, dtype)
    return whole[..., 0]


def with_graph(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    return noise(shape, seed, dtype).requires_grad_() * 2


#: How a gradient may lie in memory.
GRADS: dict[str, Callable[[torch.Size, int, torch.dtype], Tensor]] = {
    "plain": noise,
    "transposed": transposed,
    "expanded": lambda shape, seed, dtype: noise((), seed, dtype).expand(shape),
    "strided": strided,
    "with a graph": with_graph,
    "sparse": lambda shape, seed, dtype: noise(shape, seed, dtype).to_sparse(),
    "zero": lambda shape, seed, dtype: torch.zeros(shape, dtype=dtype),
}


def wider(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0] + 4, *shape[1:]) if shape else (3,)


def much_wider(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0] + 1000, *shape[1:]) if shape else (1000,)


def narrower(shape: torch.Size) -> tuple[int, ...]:
    return (max(0, shape[0] - 1), *shape[1:]) if shape else (0,)


#: What ``.data`` may be set to.
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "more rows": lambda data: noise(wider(data.shape), 1, data.dtype),
    "many more rows": lambda data: noise(much_wider(data.shape), 1, data.dtype),
    "fewer rows": lambda data: noise(narrower(data.shape), 1, data.dtype),
    "nothing": lambda data: data.new_empty(0),
    "float64": lambda data: data.double(),
    "bfloat16": lambda data: data.bfloat16(),
    "other memory": lambda data: data.clone(),
    "transposed": lambda data: reversed_dims(data),
    "transposed in memory": lambda data: transposed(data.shape, 1, data.dtype),
    "flat": lambda data: data.reshape(-1),
    "strided": lambda data: strided(data.shape, 1, data.dtype),
    "a piece": lambda data: torch.cat([data, data])[: len(data)] if data.dim() else data.clone(),
}


#: What a person may put in the place of a tensor of the state.
STATE: dict[str, Callable[[Tensor], Any]] = {
    "more rows": lambda value: noise(wider(value.shape), 1, value.dtype).abs(),
    "many more rows": lambda value: noise(much_wider(value.shape), 1, value.dtype).abs(),
    "fewer rows": lambda value: noise(narrower(value.shape), 1, value.dtype).abs(),
    "flat": lambda value: value.reshape(-1).clone(),
    "one number": lambda value: torch.ones((), dtype=value.dtype),
    "float64": lambda value: value.double(),
    "bfloat16": lambda value: value.bfloat16(),
    "int64": lambda value: value.long(),
    "meta": lambda value: value.to("meta"),
    "other memory": lambda value: value.clone(),
    "strided": lambda value: strided(value.shape, 1, value.dtype).abs_(),
    "transposed in memory": lambda value: transposed(value.shape, 1, value.dtype).abs_(),
    "expanded": lambda value: torch.ones((), dtype=value.dtype).expand(value.shape),
    "a number": lambda value: 0.5,
    "None": lambda value: None,
}
