"""GPT-2 as nanoGPT trains it, with Xavier matrices as in the paper.

Pre-LN, no biases, no dropout, tied embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.deepspeed.recipe import GPTRecipe


class Attention(nn.Module):
    """Causal self-attention; q, k and v are one matrix, stacked, which AdamW² measures as three."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Each (batch, head, time, width).
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices and a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """x = x + f(norm(x)), twice."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Returns the logits, or with `targets` the mean cross-entropy in nats a token."""

    def __init__(self, recipe: GPTRecipe) -> None:
        super().__init__()
        self.checkpoints = recipe.activation_checkpointing
        self.wte = nn.Embedding(recipe.vocabulary, recipe.hidden_size)
        self.wpe = nn.Embedding(recipe.seq_length, recipe.hidden_size)
        self.h = nn.ModuleList(
            Block(recipe.hidden_size, recipe.num_attention_heads) for _ in range(recipe.num_layers)
        )
        self.ln_f = nn.LayerNorm(recipe.hidden_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.lm_head = nn.Linear(recipe.hidden_size, recipe.vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            # The re-entrant kind is the one that works with the weights that ZeRO-3 takes away
            # after a block's forward.
            recompute = self.checkpoints and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=True) if recompute else block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
