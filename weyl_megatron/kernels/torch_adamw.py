"""AdamW's arithmetic in plain torch, operation for operation as ``torch.optim.AdamW`` does it on one tensor.

The order of the operations is what makes AdamW2 with τ = ∞ equal to torch's AdamW bit for bit.
"""

from __future__ import annotations

from torch import Tensor


def adamw_moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float) -> None:
    """M ← β₁M + (1 − β₁)G and V ← β₂V + (1 − β₂)G², in place."""
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def adamw_direction(
    exp_avg: Tensor, exp_avg_sq: Tensor, *, step: float, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Return U = M̂ / (√V̂ + ε), both corrections in the denominator's constants."""
    correction = 1 - beta1**step
    return exp_avg / exp_avg_sq.sqrt().mul_(correction / (1 - beta2**step) ** 0.5).add_(eps * correction)


def adamw_update(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    step: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """W ← W − α_W λ W − α_W U at the rate ``lr`` = α_W, in place."""
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    step_size = lr / (1 - beta1**step)
    param.addcdiv_(exp_avg, _denominator(exp_avg_sq, step=step, beta2=beta2, eps=eps), value=-step_size)


def _denominator(exp_avg_sq: Tensor, *, step: float, beta2: float, eps: float) -> Tensor:
    denominator: Tensor = exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5
    return denominator.add_(eps)
