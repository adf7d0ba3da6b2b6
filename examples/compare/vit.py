"""A small ViT on scikit-learn's handwritten digits.

They have 8×8 pixels; with patches of 2×2 these are 16 tokens and a class token.

The blocks are the GPT's of examples/collapse, without the causal mask, so that everything that
converts or recognises those works here. About 300 thousand parameters at 6 layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.collapse.model import Attention, Block, GPTConfig

CLASSES, PATCH = 10, 2
BATCH = 32


class BidirectionalAttention(Attention):
    """Every token sees every other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Takes images (N, 8, 8); returns the logits, or with ``targets`` the mean loss in nats."""

    def __init__(self, depth: int, norm: str, width: int = GPTConfig.width) -> None:
        super().__init__()
        config = GPTConfig(norm=norm, layers=depth, context=(8 // PATCH) ** 2 + 1, width=width)
        self.patch_embed = nn.Linear(PATCH**2, config.width, bias=False)
        self.cls_token = nn.Parameter(0.02 * torch.randn(config.width))
        self.pos_embed = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        for block in self.blocks:
            block.attn = BidirectionalAttention(config)
        self.norm = nn.LayerNorm(config.width, bias=False) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.width, CLASSES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = self.patch_embed(patches)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x[:, 0]))
        return logits if targets is None else F.cross_entropy(logits, targets)


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The images, standardised, and their classes.

    Three quarters are to train on, one is held out.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError(
            "compare: --task got 'vit', whose digits are scikit-learn's; it takes `pip install "
            "scikit-learn`, or --task gpt."
        ) from None
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)
    classes = torch.tensor(loaded.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order.tensor_split([len(order) // 4])
    images = (images - images[train].mean()) / images[train].std()
    return (images[train], classes[train]), (images[held_out], classes[held_out])


def batches(steps: int, seed: int, batch: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images of the training part, the same for a seed whatever trains on them."""
    images, classes = digits()[0]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (steps, batch), generator=generator)
    for index in chosen:
        yield images[index], classes[index]
