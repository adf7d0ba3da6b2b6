"""The small nets that the checks train; each has its input, and calling it gives the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _drawn(*shape: int, strided: bool) -> nn.Parameter:
    """Return a drawn parameter; where ``strided``, it is every other number of its storage."""
    return nn.Parameter(torch.randn(*shape, 2)[..., 0] if strided else torch.randn(shape))


class Affine(nn.Module):
    """‖W x + b‖²."""

    x: Tensor

    def __init__(self, rows: int = 10, columns: int = 5, strided: bool = False) -> None:
        super().__init__()
        self.weight = _drawn(rows, columns, strided=strided)
        self.bias = _drawn(rows, strided=strided)
        self.register_buffer("x", torch.randn(columns))

    def forward(self) -> Tensor:
        return (self.weight @ self.x + self.bias).square().sum()


class Images(nn.Module):
    """A convolution and a BatchNorm; the names are those of a Sequential."""

    x: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Conv2d(4, 2, 1, stride=2))
        self.add_module("1", nn.BatchNorm2d(2))
        self.register_buffer("x", torch.rand(1, 4, 16, 16))

    def forward(self) -> Tensor:
        conv, norm = self.children()
        return norm(conv(self.x)).sum()


class Layers(nn.Module):
    """Two layers with sigmoids, and a factor, whose shape is () (pytorch #100701)."""

    x: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.factor = nn.Parameter(torch.rand(()))
        self.register_buffer("x", torch.arange(1.0, 7.0).reshape(3, 2) / 10)

    def forward(self) -> Tensor:
        return (self.factor * self.second(self.first(self.x).sigmoid()).sigmoid()).sum()
