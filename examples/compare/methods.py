"""The methods that are compared, in one table.

What each does to the model, its optimizers and their rates. All of them decay the matrices by 0.1
and vectors (gains, γ) not at all, and none has a warmup unless its row says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weyl_megatron import AdamW2
from weyl_megatron.settings import VECTORS

WEIGHT_DECAY, BETA1 = 0.1, 0.9

#: What a tuned warmup is chosen from, as shares of the steps.
WARMUPS = (0.05, 0.1, 0.2, 0.5)

#: The seed of the runs that choose it, which is never reported.
TUNING_SEED = 1000


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The hidden matrices, the other matrices and the vectors, with their names.

    Other matrices are embeddings, positions and the head.
    """
    hidden, others, vectors = [], [], []
    for name, param in model.named_parameters():
        is_hidden = name.startswith("blocks.") and param.ndim == 2
        group = vectors if param.ndim < 2 else hidden if is_hidden else others
        group.append((name, param))
    return [
        {"params": hidden, "weight_decay": WEIGHT_DECAY, "is_hidden": True},
        {"params": others, "weight_decay": WEIGHT_DECAY, "is_hidden": False},
        {"params": vectors, "weight_decay": 0.0, "is_hidden": False},
    ]


def adamw(model: nn.Module, lr: float, beta2: float) -> list[Optimizer]:
    return [torch.optim.AdamW(parameter_groups(model), lr=lr, betas=(BETA1, beta2), fused=True)]


def adamw2(
    tau: float | str, model: nn.Module, lr: float, beta2: float, clip: str = "scale"
) -> list[Optimizer]:
    return [AdamW2(parameter_groups(model), lr=lr, betas=(BETA1, beta2), tau=tau, clip=clip)]


def radam(model: nn.Module, lr: float, beta2: float) -> list[Optimizer]:
    groups = parameter_groups(model)
    return [torch.optim.RAdam(groups, lr=lr, betas=(BETA1, beta2), decoupled_weight_decay=True)]


def muon(model: nn.Module, lr: float, beta2: float) -> list[Optimizer]:
    """Muon on the hidden matrices, AdamW on the rest, at one rate.

    "match_rms_adamw" makes Muon's steps as large.
    """
    hidden, *rest = parameter_groups(model)
    size = "match_rms_adamw"
    return [
        torch.optim.Muon([hidden], lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn=size),
        torch.optim.AdamW(rest, lr=lr, betas=(BETA1, beta2), fused=True),
    ]


def reparametrize(model: nn.Module) -> None:
    from weyl_megatron.transformer import sigma_reparam

    sigma_reparam(model)


def scale(model: nn.Module) -> None:
    from weyl_megatron.transformer import scale_residuals

    scale_residuals(model)


class HeadNorm(nn.Module):
    """A LayerNorm of every head by itself, with one gain for all of them."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width // heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)


def norm_queries_and_keys(model: nn.Module) -> None:
    """Put a norm behind W_q and W_k of every block."""
    for block in model.blocks:
        attn = block.attn
        attn.q = nn.Sequential(attn.q, HeadNorm(attn.num_heads, attn.q.out_features))
        attn.k = nn.Sequential(attn.k, HeadNorm(attn.num_heads, attn.k.out_features))


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    title: str
    note: str
    color: str
    optimizers: Callable[[nn.Module, float, float], list[Optimizer]] = adamw  # of model, lr and β₂
    convert: Callable[[nn.Module], None] | None = None  # the model, in place
    warmup: float | None = 0.0  # the share of the steps; None: tuned
    warms_all: bool = True  # or the hidden matrices only
    clip: float | None = None  # the norm of the gradient


METHODS = {
    "adamw": Method("AdamW", "no warmup", "#c8452d"),
    "warmup": Method(
        "AdamW, tuned warmup",
        "over the best of 5, 10, 20 and 50 % of the steps, chosen for every task, depth, norm, "
        "rate and β₂ by the validation score of one run each with a seed that is not reported",
        "#6b7280",
        warmup=None,
    ),
    "warmup-hidden": Method(
        "AdamW, warmup on hidden matrices",
        "over 50 % of the steps, not tuned; all other parameters start at the full rate",
        "#a16207",
        warmup=0.5,
        warms_all=False,
    ),
    "adamw2": Method("AdamW², τ = 0.01", "the paper's τ for GPT", "#0f8a78", partial(adamw2, 0.01)),
    "adamw2-slow": Method(
        "AdamW², τ = 0.004", "the paper's τ for ViT", "#3b9fd8", partial(adamw2, 0.004)
    ),
    "adamw2-auto": Method(
        "AdamW², τ = balanced",
        "one budget for the hidden matrices",
        "#5b4bd6",
        partial(adamw2, "balanced"),
    ),
    "adamw2-project": Method(
        "AdamW², τ = balanced, projected",
        "one budget for the hidden matrices, whose updates' singular values are clipped "
        f'(clip="project"; {VECTORS} vectors)',
        "#e11d48",
        partial(adamw2, "balanced", clip="project"),
    ),
    "adamw2-project-0.01": Method(
        "AdamW², τ = 0.01, projected",
        "the paper's τ for GPT; hidden matrices' updates have their singular values clipped",
        "#ca9a04",
        partial(adamw2, 0.01, clip="project"),
    ),
    "sigma-reparam": Method(
        "σReparam", "W replaced by γ W/σ₁(W), γ learned; AdamW", "#d946a0", convert=reparametrize
    ),
    "residual": Method(
        "1/√L residuals", "every residual branch times 1/√L; AdamW", "#e08a1e", convert=scale
    ),
    "qk-norm": Method(
        "QK-norm",
        "LayerNorm on the queries and keys of each head; AdamW",
        "#65a30d",
        convert=norm_queries_and_keys,
    ),
    "clip": Method("AdamW, clipping", "the gradient's norm clipped to 1", "#b08968", clip=1.0),
    "radam": Method("RAdam", "with decoupled weight decay", "#8b5cf6", radam),
    "muon": Method(
        "Muon",
        'hidden matrices by Muon at the same rate (adjust_lr_fn="match_rms_adamw", momentum 0.95), '
        "the rest by AdamW",
        "#22a559",
        muon,
    ),
}
