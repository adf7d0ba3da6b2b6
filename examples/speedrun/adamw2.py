"""AdamW² in one file, for the optimizer track of the public GPT speed run: nothing is imported but
torch, and nothing is spread over ranks; every rank makes the same step of the same gradients.

Paste it into the training script. Weights of two dimensions are bounded, all others are AdamW's:

    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    io = [model.embed.weight, model.head.weight]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = AdamW2(balanced(hidden, io, rest), lr=3e-3, betas=(0.9, 0.95), clip="project")

α_W = min(α, τ σ₁(W) / σ₁(U)), after Qi et al., "Taming Transformer Without Using Learning Rate
Warmup". No warmup is needed. clip="scale" shrinks an update that is too large, as the paper does;
"project" clips its singular values, as far as a block of `vectors` sees them.
tests/examples/test_speedrun.py holds it to weyl_megatron/reference.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Block power iterations of a matrix in its first step, from random vectors, and in every other.
COLD, WARM = 12, 2

#: Vectors of W, and of U where it is scaled.
VECTORS = 4

#: What the vectors do not see of U is taken for so many times its smallest singular value that
#: they see.
UNSEEN = 1.5


def balanced(
    hidden: Sequence[Tensor], io: Sequence[Tensor], rest: Iterable[Tensor] = (), **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups with a τ that needs no tuning: 0.144 is shared out over the hidden
    matrices, embeddings and head get 0.1, and σ₁(W) counts for at least a Xavier matrix's.
    """
    groups = [
        {"params": list(hidden), "tau": 0.144 / max(1, len(hidden)), "floor": "xavier"},
        {"params": list(io), "tau": 0.1, "floor": "xavier", "clip": "scale"},
        {"params": list(rest)},
    ]
    return [{**options, **group} for group in groups if group["params"]]


class AdamW2(torch.optim.Optimizer):
    """See above.

    Args:
        params: parameters or groups of them, each with its own of what follows.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        tau: τ; infinity is AdamW.
        floor: σ₁(W) counts for at least that of a random matrix of this standard deviation, or
            of a "xavier" matrix.
        clip: "scale" or "project".
        vectors: that see an update under "project".
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        tau: float = 0.01,
        floor: float | str = 1e-3,
        clip: str = "scale",
        vectors: int = 8,
    ) -> None:
        if clip not in ("scale", "project"):
            raise ValueError(f"AdamW2: clip got {clip!r}, it takes 'scale' or 'project'.")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options |= {"tau": tau, "floor": floor, "clip": clip, "vectors": vectors}
        super().__init__(params, options)
        self._started = 0  # matrices that have start vectors

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                update = self._update(param, state, group)
                if param.ndim == 2 and group["tau"] != float("inf"):
                    alike.setdefault((param.shape, param.device), []).append((param, update, state))
                else:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(group["lr"] * update)
            for members in alike.values():  # of one shape: all at once
                self._move(members, group)
        return loss

    def _update(self, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return U = M̂ / (√V̂ + ε), in float32 at least."""
        (beta1, beta2), grad = group["betas"], param.grad
        assert grad is not None
        dtype = torch.promote_types(param.dtype, torch.float32)
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(param, dtype=dtype) for _ in range(2)
            )
        state["step"] += 1
        grad = grad.to(dtype)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
        m = state["exp_avg"] / (1 - beta1 ** state["step"])
        v = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        return m / (v.sqrt() + group["eps"])

    def _move(
        self, members: Sequence[tuple[Tensor, Tensor, dict[str, Any]]], group: dict[str, Any]
    ) -> None:
        """Move matrices of one shape, (k, m, n) of them side by side."""
        params, updates, states = zip(*members, strict=True)
        u = torch.stack(updates)
        w = torch.stack([param.to(u.dtype) for param in params])
        lr, tau, projects = group["lr"], group["tau"], group["clip"] == "project"
        sigma_w = self._sigma(w, states, "of_w", VECTORS)[0]
        width = group["vectors"] if projects else VECTORS
        sigma_u, seen = self._sigma(u, states, "of_u", width)
        bound = tau * sigma_w.clamp(min=_floor(group["floor"], *w.shape[1:]))  # (k,)
        if projects:
            change = _projected(u, lr, bound, seen)
            is_over = lr * sigma_u > bound
            change = torch.where(is_over[:, None, None], change, lr * u)
            decay = torch.full_like(bound, lr)
        else:
            decay = (bound / sigma_u).nan_to_num(nan=lr, posinf=lr).clamp(max=lr)
            change = decay[:, None, None] * u
        w = w * (1 - group["weight_decay"] * decay[:, None, None]) - change
        for param, moved in zip(params, w, strict=True):
            param.copy_(moved)

    def _sigma(
        self, a: Tensor, states: Sequence[dict[str, Any]], key: str, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return σ₁, (k,), of matrices (k, m, n), and the vectors (k, n, b) that their last
        iteration began with: block power iteration, each matrix from where its last step ended.
        """
        count = WARM
        for state in states:
            if key not in state:
                count = COLD
                generator = torch.Generator().manual_seed(self._started)
                self._started += 1
                size = a.shape[2], min(width, *a.shape[1:])
                start = torch.randn(size, generator=generator, dtype=torch.float64)
                state[key] = torch.linalg.qr(start).Q.to(a)
        x = torch.stack([state[key] for state in states])
        for _ in range(count):
            seen = x
            left = torch.linalg.qr(a @ x).Q  # (k, m, b)
            x, after = torch.linalg.qr(a.mT @ left)  # (k, n, b), (k, b, b)
        for state, vectors in zip(states, x, strict=True):
            state[key] = vectors
        return torch.linalg.matrix_norm(after, 2), seen


def _floor(kind: float | str, rows: int, cols: int) -> float:
    """Return what σ₁ of a random matrix is about."""
    std = (2 / (rows + cols)) ** 0.5 if isinstance(kind, str) else kind
    return float(std * (rows**0.5 + cols**0.5))


def _projected(u: Tensor, lr: float, bound: Tensor, x: Tensor) -> Tensor:
    """Return the updates nearest to α U, (k, m, n), whose singular values are at most ``bound``,
    as far as vectors X, (k, n, b), see them: U is Σ θᵢ qᵢ wᵢᵀ of what they see and a rest, whose
    largest singular value is taken for 1.5 of the smallest θᵢ.
    """
    q = torch.linalg.qr(u @ x).Q  # (k, m, b), an orthonormal basis of U X
    left, theta, right = torch.linalg.svd(q.mT @ u, full_matrices=False)
    left = q @ left
    norm = torch.linalg.matrix_norm(u)
    rest = (norm.square() - theta.square().sum(-1)).clamp(min=0).sqrt()
    unseen = torch.minimum(UNSEEN * theta[:, -1], rest + 1e-3 * norm)
    is_whole = x.shape[2] == min(u.shape[1:])
    rate = torch.full_like(bound, lr) if is_whole else (bound / unseen).clamp(max=lr)
    kept = torch.minimum(lr * theta, bound[:, None]) - rate[:, None] * theta
    return rate[:, None, None] * u + (left * kept[:, None]) @ right
