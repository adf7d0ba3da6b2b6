"""Algorithm 1 on one device, as plain as it can be. Slow; what every faster path is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .rule import SLOW_TAU, project
from .spectral import ritz
from .spectral.blocks import start_block
from .spectral.power import BLOCK, COLD_ITERS


def exact_sigma(matrix: Tensor) -> float:
    """Return σ₁ by singular value decomposition."""
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


class BlockPower:
    """σ₁ of one whole matrix by the same block power iteration that the sharded code runs on
    tiles.
    """

    def __init__(
        self, name: str, iters: int = 2, width: int = BLOCK, least: int | None = None
    ) -> None:
        self.name, self.iters, self.width = name, iters, width
        self.least = (iters + 1) // 2 if least is None else least
        self.block: Tensor | None = None  # (cols, b)
        self.multiplied = torch.empty(0)  # the block before the last iteration

    def __call__(self, matrix: Tensor) -> float:
        iters, least = self.iters, self.least
        if self.block is None:
            iters = least = max(iters, COLD_ITERS)
            start = start_block(self.name, matrix.shape[1], min(self.width, *matrix.shape))
            self.block = start.to(matrix.dtype)
        for made in range(1, iters + 1):
            self.multiplied = self.block
            left, before = torch.linalg.qr(matrix @ self.block)  # (rows, b), (b, b)
            self.block, after = torch.linalg.qr(matrix.T @ left)  # (cols, b), (b, b)
            sigma = float(torch.linalg.matrix_norm(after, 2))
            gain = sigma - float(torch.linalg.matrix_norm(before, 2))
            if made >= least and gain <= ritz.SETTLED * sigma:
                break
        return sigma


def projected(
    update: Tensor, lr: float, bound: float, right: Tensor | None
) -> tuple[Tensor, float]:
    """Return the update nearest to α U whose singular values are at most ``bound``, and its
    Frobenius norm's share of α U's: by singular value decomposition, or as far as vectors
    ``right``, (cols, b), see it.
    """
    if right is None:
        left, values, right = torch.linalg.svd(lr * update, full_matrices=False)
        change = (left * values.clamp(max=bound)) @ right
    else:
        y = update @ right
        z = y.T @ update
        grams = (y.T @ y)[None].double(), (z @ z.T)[None].double()
        numbers = torch.tensor([[lr], [bound], [float(update.norm())]], dtype=torch.float64)
        is_whole = torch.tensor([right.shape[1] == min(update.shape)])
        eps = torch.finfo(update.dtype).eps
        clip = project(grams, numbers[0], numbers[1], numbers[2], is_whole, eps)
        change = float(clip.rate) * update + y @ (clip.factor[0].to(z.dtype) @ z)
    return change, float(change.norm() / (lr * update.norm()))


class AdamW2Reference:
    """AdamW² for 2-D parameters and vectors, one at a time, in the order of the paper's lines.

    Args:
        params: ``(name, parameter)`` pairs.
        lr, betas, eps, weight_decay, tau: as in :class:`.AdamW2`; τ is a number.
        sigma: makes, from a matrix's name and a number of iterations, the function that measures
            σ₁: ``BlockPower``, or ``lambda *_: exact_sigma``.
        floor: σ₁(W) is taken for at least ``floor(rows, cols)``.
        clip: what Rule 1 does to an update that is too large: "scale", or "project".
        vectors: those that "project" sees the update with; None: its singular value decomposition.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        tau: float = 0.01,
        sigma: Callable[[str, int], Callable[[Tensor], float]] = BlockPower,
        floor: Callable[[int, int], float] = lambda rows, cols: 1e-3 * (rows**0.5 + cols**0.5),
        clip: str = "scale",
        vectors: int | None = None,
    ) -> None:
        self.params = dict(params)
        self.lr, self.eps, self.weight_decay, self.tau = lr, eps, weight_decay, tau
        self.beta1, self.beta2 = betas
        self.floor, self.t, self.clip = floor, 0, clip
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.params.items()
        }
        of_weight = 1 if tau <= SLOW_TAU else 2
        self.sigma = {
            name: (sigma(name, of_weight), sigma(name, 2))
            for name, p in self.params.items()
            if p.ndim == 2
        }
        width = vectors if clip == "project" else None
        self.blocks = {name: BlockPower(name, 2, width, 2) for name in self.sigma if width}

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        """Make one step; return the rate of every parameter."""
        self.t += 1  # line 1
        rates = {}
        for name, w in self.params.items():
            g = w.grad  # line 2
            if g is None:
                continue
            m, v = self.moments[name]
            m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)  # line 3
            v.mul_(self.beta2).add_(g * g, alpha=1 - self.beta2)
            m_hat, v_hat = m / (1 - self.beta1**self.t), v / (1 - self.beta2**self.t)  # line 4
            u = m_hat / (v_hat.sqrt() + self.eps)  # line 5; ε outside the root, as in torch
            rate = decay = self.lr
            change = rate * u
            if w.ndim == 2:
                sigma_of_w, sigma_of_u = self.sigma[name]
                delta, sigma = sigma_of_u(u), max(sigma_of_w(w), self.floor(*w.shape))  # line 6
                if (block := self.blocks.get(name)) is not None:
                    delta = block(u)
                if rate * delta > self.tau * sigma:  # line 7
                    if self.clip == "project":
                        seen = None if block is None else block.multiplied
                        change, share = projected(u, rate, self.tau * sigma, seen)
                        rate *= share
                    else:
                        rate = decay = self.tau * sigma / delta  # line 8
                        change = rate * u
            w.sub_(change + decay * self.weight_decay * w)  # line 11
            rates[name] = rate
        return rates
