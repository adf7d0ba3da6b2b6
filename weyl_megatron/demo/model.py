"""A byte-level GPT with layer norms behind the residual sums (post-LN): warmup matters most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model."""

    vocabulary: int = 256
    context: int = 64
    layers: int = 5
    heads: int = 4
    width: int = 64


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, config.width, bias=False)
        self.v = nn.Linear(config.width, config.width, bias=False)
        self.o = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(linear(x)) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out

    def entropy(self, x: Tensor) -> Tensor:
        """Entropy of the attention map in nats, (head, query), averaged over the batch."""
        q, k = self._split(self.q(x)).float(), self._split(self.k(x)).float()
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attention = scores.masked_fill(future, float("-inf")).softmax(-1)
        entropy: Tensor = torch.special.entr(attention).sum(-1).mean(0)
        return entropy

    def _split(self, x: Tensor) -> Tensor:
        """(batch, time, width) to (batch, head, time, width / heads)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """Two matrices and a GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.gelu(self.fc(x)))
        return out


class Block(nn.Module):
    """One transformer layer, post-LN: x = LN(x + f(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.ln_1 = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)
        self.ln_2 = nn.LayerNorm(config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        out: Tensor = self.ln_2(x + self.mlp(x))
        return out


class GPT(nn.Module):
    """The model: returns the logits, or with `targets` the mean cross-entropy in nats per byte."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self._embed(tokens)
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def attention_entropy(self, tokens: Tensor) -> Tensor:
        """Entropy of each head's attention in nats, the mean over batch and queries.

        Args:
            tokens: (batch, time).

        Returns:
            (layers, heads).
        """
        x = self._embed(tokens)
        entropies = []
        for block in self.h:
            assert isinstance(block, Block)
            entropies.append(block.attn.entropy(x).mean(-1))
            x = block(x)
        return torch.stack(entropies)

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.size(1) > self.config.context:
            raise ValueError(
                f"tokens takes at most {self.config.context} positions, got {tokens.size(1)}"
            )
        x: Tensor = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        return x


def uniform_entropy(context: int) -> float:
    """`attention_entropy` where attention is uniform over the visible keys: mean log 1 … log T."""
    return torch.arange(1, context + 1).double().log().mean().item()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
