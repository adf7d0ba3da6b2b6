"""FLatten-Swin-S (Han et al. 2023): Swin-S whose first two stages attend linearly.

They attend over the whole image. timm has no such model; it is timm's Swin with the attention of 4
of its 24 blocks replaced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

FOCUS, KERNEL = 3, 5


class FocusedLinearAttention(nn.Module):
    """φ(q) φ(k)ᵀ v in linear time, plus a depth-wise convolution of v (Equations 5 to 9).

    The convolution restores the rank.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.positional_encoding = nn.Parameter(torch.zeros(1, side * side, width))
        self.scale = nn.Parameter(torch.zeros(width))
        head = width // heads
        self.depthwise = nn.Conv2d(head, head, KERNEL, padding=KERNEL // 2, groups=head)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (batch, side², width). There is one window, so that nothing is masked."""
        assert mask is None
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self._focus(q), self._focus(k + self.positional_encoding)
        # (batch, head, side², width)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        shares = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6
        y = q @ (k.transpose(-2, -1) @ v / v.shape[-2]) / shares
        pixels = v.flatten(0, 1).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        y = y + self.depthwise(pixels).flatten(2).transpose(1, 2).unflatten(0, (-1, self.heads))
        return self.proj(y.transpose(1, 2).flatten(2))

    def _focus(self, x: Tensor) -> Tensor:
        """φ: the direction of relu(x) raised to a power, at its old length.

        Close directions come closer.
        """
        x = (F.relu(x) + 1e-6) / F.softplus(self.scale)
        powered = x**FOCUS
        return powered * (x.norm(dim=-1, keepdim=True) / powered.norm(dim=-1, keepdim=True))


def flatten_swin_small(
    img_size: int = 224, num_classes: int = 1000, **options: Any
) -> SwinTransformer:
    """Return FLatten-Swin-S: depths 2, 2, 18, 2, width 96; windows of 7 in the last two stages."""
    sides = [img_size // 4, img_size // 8]
    model = SwinTransformer(
        img_size=img_size,
        num_classes=num_classes,
        depths=(2, 2, 18, 2),
        window_size=(*sides, 7, 7),
        **options,
    )
    for stage, side in zip(model.layers, sides, strict=False):
        for block in stage.blocks:
            block.attn = FocusedLinearAttention(block.dim, block.attn.num_heads, side)
    return model
