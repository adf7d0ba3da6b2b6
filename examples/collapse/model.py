"""A byte-level GPT with the norm where you want it.

It is behind each residual sum (post) or in front of each branch (pre).

No biases, Xavier-uniform matrices, embeddings N(0, 0.02), an untied head: the model on which both
of attention's collapses are cheap to see. About 400 thousand parameters at the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model."""

    norm: str = "post"  # or "pre"
    vocabulary: int = 256
    context: int = 64
    layers: int = 6
    heads: int = 4
    width: int = 64


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        width = config.width
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices and a GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, 4 * config.width, bias=False)
        self.fc2 = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """post: x = norm(x + f(x)). pre: x = x + f(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.is_pre = config.norm == "pre"
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, bias=False) for _ in range(2))
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_pre:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class GPT(nn.Module):
    """Returns the logits, or with ``targets`` the mean cross-entropy in nats a byte."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.norm not in ("pre", "post"):
            raise ValueError(f"norm got {config.norm!r}, it takes 'pre' or 'post'.")
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        has_norm = config.norm == "pre"
        self.norm = nn.LayerNorm(config.width, bias=False) if has_norm else nn.Identity()
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
