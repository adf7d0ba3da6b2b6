"""What AdamW² is compared with: other optimizers' own implementations, and its algorithm written
down naively.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Weights = Mapping[str, nn.Parameter]
OPTIONS: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def peers(
    weights: Callable[[], Weights], device: torch.device, deepspeed: bool
) -> dict[str, Callable[[], Any]]:
    """Return what makes each peer that can run here; a line says which cannot, and why."""
    makers: dict[str, Callable[[], Any]] = {
        "torch.optim.AdamW(fused)": lambda: torch.optim.AdamW(
            weights().values(), fused=True, **OPTIONS
        ),
    }
    if deepspeed:
        name = "FusedAdam" if device.type == "cuda" else "DeepSpeedCPUAdam"
        makers[f"deepspeed.ops.adam.{name}"] = lambda: _deepspeed(name, weights())
    try:
        from apex.optimizers import FusedAdam

        makers["apex.optimizers.FusedAdam"] = lambda: FusedAdam(weights().values(), **OPTIONS)
    except ImportError:
        print("apex is not installed: its FusedAdam is left out", flush=True)
    if hasattr(torch.optim, "Muon"):
        makers["torch.optim.Muon"] = lambda: _Muon(weights())
    else:
        print(f"torch {torch.__version__} has no Muon: it is left out", flush=True)
    return makers


def _deepspeed(name: str, weights: Weights) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if name == "FusedAdam" else "cpu")
    from deepspeed.ops import adam

    decoupled = {"adamw_mode": True} if name == "DeepSpeedCPUAdam" else {"adam_w_mode": True}
    return getattr(adam, name)(list(weights.values()), **decoupled, **OPTIONS)


class _Muon:
    """torch.optim.Muon on the hidden matrices, as its users have it, and fused AdamW on the
    rest.
    """

    def __init__(self, weights: Weights) -> None:
        hidden = [
            p for name, p in weights.items() if p.ndim == 2 and ("attn" in name or "mlp" in name)
        ]
        rest = [p for p in weights.values() if not any(p is matrix for matrix in hidden)]
        adamw = torch.optim.AdamW(rest, fused=True, **OPTIONS)
        self.parts = [torch.optim.Muon(hidden, lr=1e-6), adamw]

    def step(self) -> None:
        for part in self.parts:
            part.step()


class Naive:
    """The paper's Algorithm 1, one matrix after the other, 3 power iterations from random starts
    for W and for U.
    """

    def __init__(self, weights: Weights, lr: float, tau: float) -> None:
        self.weights, self.lr, self.tau, self.t = list(weights.values()), lr, tau, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.weights]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        beta1, beta2 = OPTIONS["betas"]
        for p, (m, v) in zip(self.weights, self.moments, strict=True):
            assert p.grad is not None
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            update = m / (1 - beta1**self.t) / ((v / (1 - beta2**self.t)).sqrt() + OPTIONS["eps"])
            rate = self.lr
            if p.ndim > 1:
                sigma, delta = power_iteration(p.flatten(1)), power_iteration(update.flatten(1))
                if rate * delta > self.tau * sigma:
                    rate = self.tau * sigma / delta
            p.sub_(rate * update + rate * OPTIONS["weight_decay"] * p)


def power_iteration(matrix: Tensor, iterations: int = 3) -> float:
    """Return about σ₁ from a random start."""
    x = torch.randn(matrix.shape[1], device=matrix.device)
    for _ in range(iterations):
        y = matrix @ (x / x.norm())
        x = matrix.T @ (y / y.norm())
    return float(x.norm())
