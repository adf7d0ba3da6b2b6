"""What the workers of test_layouts.py share.

Models, a global batch that is the same at any number of processes, and norms and logits taken by
plain indexing of whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.watch.watch import Watch

STEPS, HEADS, WIDTH = 2, 2, 24
Loss = Callable[[nn.Module, Tensor], Tensor]


def separate() -> nn.Module:
    """W_q, W_k and W_v each by itself."""
    torch.manual_seed(3)
    return GPT(GPTConfig(norm="pre", vocabulary=50, context=16, layers=3, heads=HEADS, width=WIDTH))


def stacked() -> nn.Module:
    """One weight (in, q + k + v): outputs are its columns."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    sizes = {"n_layer": 2, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": 50, "n_positions": 16}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, use_cache=False))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    if hasattr(getattr(model, "module", model), "lm_head"):
        loss: Tensor = model(tokens[:, :-1], labels=tokens[:, :-1]).loss
        return loss
    return model(tokens[:, :-1], tokens[:, 1:])  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"separate": separate, "stacked": stacked}


def batch(step: int) -> Tensor:
    """This rank's part of the global batch."""
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def steps(
    watch: Watch, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], None]
) -> list[dict[str, float]]:
    """Return the measurement of each step; ``backward`` makes it."""
    measurements = []
    for step in range(STEPS):
        loss = forward(batch(step))
        backward(loss)
        measurements.append(dict(watch.step(loss)))
    watch.close()
    return measurements


def exact_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖G‖ of W_q, W_k and W_v by tag, from the whole gradients of a model above."""
    norms = {}
    for name, gradient in gradients.items():
        parts = name.split(".")
        number = next((part for part in parts if part.isdigit()), None)
        if ".attn.c_attn.weight" in name:
            for role, columns in zip("qkv", gradient.split(WIDTH, 1), strict=True):
                norms[f"block/{number}/grad_{role}"] = float(columns.double().norm())
        elif parts[-3:-2] == ["attn"] and parts[-2] in "qkv":
            norms[f"block/{number}/grad_{parts[-2]}"] = float(gradient.double().norm())
    return norms


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: param.grad for name, param in named if param.grad is not None}


def exact_logits(block: int, q: Tensor, k: Tensor) -> Iterator[tuple[str, float]]:
    """Yield what the causal logits of q and k, ``(batch, heads, tokens, d)``, are by tag."""
    q, k, scale = q.double(), k.double(), q.shape[-1] ** -0.5
    tokens = q.shape[2]
    for head in range(q.shape[1]):
        largest = [
            [
                max(float(q[b, head, t] @ k[b, head, s]) * scale for s in range(t + 1))
                for t in range(tokens)
            ]
            for b in range(q.shape[0])
        ]
        bounds = [
            scale * float(q[b, head].norm(dim=-1).max() * k[b, head].norm(dim=-1).max())
            for b in range(q.shape[0])
        ]
        tag = f"block/{block}/head/{head}"
        yield f"{tag}/max_logit", max(map(max, largest))
        yield f"{tag}/max_logit_mean", math.fsum(map(math.fsum, largest)) / (len(q) * tokens)
        yield f"{tag}/max_logit_bound", max(bounds)


def made(kind: str, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    from weyl_megatron import AdamW2

    if kind == "adamw2":
        return AdamW2(parameters, lr=0.01, eps=1e-4, **options)
    return torch.optim.AdamW((p for _, p in parameters), lr=0.01, eps=1e-4, **options)
