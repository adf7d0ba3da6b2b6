"""tests/net.py with tensor parallelism as Megatron marks it: attributes of the parameters, and an
``mpu``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ToyMpu:
    """The model-parallel unit that ``deepspeed.initialize(mpu=…)`` takes: neighbours are
    tensor-parallel.
    """

    def __init__(self, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self.size, self.rank = size, rank % size
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.tensor_group = group
        for offset in range(size):
            ranks = list(range(offset, world, size))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.data_group = group

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_rank(self) -> int:
        return self.rank

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        return self.size

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data_group)


class _Copy(torch.autograd.Function):
    """Identity forward, sum over the tensor-parallel ranks backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """Sum over the tensor-parallel ranks forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ColumnParallel(nn.Module):
    def __init__(self, linear: nn.Linear, mpu: ToyMpu) -> None:
        super().__init__()
        rows = band(linear.weight.shape[0], mpu)
        self.weight = marked(linear.weight.data[rows], 0)
        self.bias = marked(linear.bias.data[rows], 0)
        self.group = mpu.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(_Copy.apply(x, self.group), self.weight, self.bias)


class RowParallel(nn.Module):
    def __init__(self, linear: nn.Linear, mpu: ToyMpu) -> None:
        super().__init__()
        self.weight = marked(linear.weight.data[:, band(linear.weight.shape[1], mpu)], 1)
        self.bias = linear.bias
        self.group = mpu.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        return _Sum.apply(nn.functional.linear(x, self.weight), self.group) + self.bias


def band(extent: int, mpu: ToyMpu) -> slice:
    """This rank's share; the first ranks get one more where it does not divide."""
    edges = [-(-extent * r // mpu.size) for r in range(mpu.size + 1)]
    return slice(edges[mpu.rank], edges[mpu.rank + 1])


def marked(data: Tensor, dim: int) -> nn.Parameter:
    parameter = nn.Parameter(data.clone().contiguous())
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1
    return parameter


def tensor_parallel_net(net: Any, mpu: ToyMpu) -> Any:
    net.up = ColumnParallel(net.up, mpu)
    net.down = RowParallel(net.down, mpu)
    return net


def whole(param: Any, mine: Tensor, engine: Any) -> Tensor:
    """Return the full parameter from every tensor-parallel rank's share of it, for either kind of
    mark.
    """
    dim = getattr(param, "partition_dim", None)
    if dim is None:
        dim = (getattr(param, "ds_autotp_universal_checkpoint_meta", None) or {}).get(
            "partition_dim"
        )
    get = getattr(engine.mpu, "get_tensor_model_parallel_group", None)
    if dim is None or get is None or not getattr(param, "tensor_model_parallel", False):
        return mine.clone()
    parts: list[Any] = [None] * dist.get_world_size(get())
    dist.all_gather_object(parts, mine, group=get())
    return torch.cat(parts, dim)
