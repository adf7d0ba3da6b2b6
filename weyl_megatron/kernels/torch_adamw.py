"""AdamW's arithmetic in plain torch, operation for operation as ``torch.optim.AdamW`` does it on
one tensor.

The order of the operations is what makes AdamW2 with τ = ∞ equal to torch's AdamW bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stepped import Hyper


def adamw_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, largest: Tensor | None, hyper: Hyper
) -> None:
    """M ← β₁M + (1 − β₁)G and V ← β₂V + (1 − β₂)G², in place; ``largest``, if any, grows to V
    (amsgrad).

    Moments in another dtype than G are worked out in float32 at least, and rounded to theirs.
    """
    moments = [exp_avg, exp_avg_sq] if largest is None else [exp_avg, exp_avg_sq, largest]
    if any(moment.dtype != grad.dtype for moment in moments):
        wide = torch.promote_types(grad.dtype, torch.float32)
        first, second = exp_avg.to(wide), exp_avg_sq.to(wide)
        adamw_moments(grad.to(wide), first, second, None, hyper)
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)
        if largest is not None:
            torch.maximum(largest, exp_avg_sq, out=largest)
        return
    beta1 = hyper.beta1
    if isinstance(beta1, Tensor):
        beta1 = beta1.to(grad.device, grad.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)  # type: ignore[arg-type]
    if largest is not None:
        torch.maximum(largest, exp_avg_sq, out=largest)


def adamw_direction(exp_avg: Tensor, second: Tensor, hyper: Hyper) -> Tensor:
    """Return U = M̂ / (√V̂ + ε), both corrections in the denominator's constants; ``second`` is V,
    or its largest.
    """
    correction = hyper.correction1
    denominator = second.sqrt().mul_(correction / hyper.correction2**0.5)
    return exp_avg / denominator.add_(hyper.eps * correction)


def adamw_move(
    param: Tensor, exp_avg: Tensor, second: Tensor, hyper: Hyper, rate: float | Tensor
) -> None:
    """W ← W − α_W λ W − α_W U at the rate α_W, in place."""
    if hyper.weight_decay != 0:
        param.mul_(1 - rate * hyper.weight_decay)
    size = -(rate / hyper.correction1)
    param.addcdiv_(exp_avg, _denominator(second, hyper), value=size)  # type: ignore[arg-type]


def adamw_undo(
    param: Tensor, exp_avg: Tensor, second: Tensor, hyper: Hyper, rate: float | Tensor
) -> None:
    """Take :func:`adamw_move` back, up to the rounding of one more step."""
    size = rate / hyper.correction1
    param.addcdiv_(exp_avg, _denominator(second, hyper), value=size)  # type: ignore[arg-type]
    if hyper.weight_decay != 0:
        param.div_(1 - rate * hyper.weight_decay)


def _denominator(second: Tensor, hyper: Hyper) -> Tensor:
    denominator: Tensor = second.sqrt() / hyper.correction2**0.5
    return denominator.add_(hyper.eps)
