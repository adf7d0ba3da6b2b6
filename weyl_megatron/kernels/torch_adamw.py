"""AdamW's arithmetic in plain torch, operation for operation as ``torch.optim.AdamW`` does it on one tensor.

The order of the operations is what makes AdamW2 with τ = ∞ equal to torch's AdamW bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from weyl_megatron.kernels.stepped import Hyper


def adamw_moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> None:
    """M ← β₁M + (1 − β₁)G and V ← β₂V + (1 − β₂)G², in place."""
    exp_avg.lerp_(grad, 1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)


def adamw_direction(exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper) -> Tensor:
    """Return U = M̂ / (√V̂ + ε), both corrections in the denominator's constants."""
    correction = hyper.correction1
    return exp_avg / exp_avg_sq.sqrt().mul_(correction / hyper.correction2**0.5).add_(hyper.eps * correction)


def adamw_move(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper, rate: float) -> None:
    """W ← W − α_W λ W − α_W U at the rate α_W, in place."""
    if hyper.weight_decay != 0:
        param.mul_(1 - rate * hyper.weight_decay)
    param.addcdiv_(exp_avg, _denominator(exp_avg_sq, hyper), value=-(rate / hyper.correction1))


def adamw_undo(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper, rate: float) -> None:
    """Take :func:`adamw_move` back, up to the rounding of one more step."""
    param.addcdiv_(exp_avg, _denominator(exp_avg_sq, hyper), value=rate / hyper.correction1)
    if hyper.weight_decay != 0:
        param.div_(1 - rate * hyper.weight_decay)


def _denominator(exp_avg_sq: Tensor, hyper: Hyper) -> Tensor:
    denominator: Tensor = exp_avg_sq.sqrt() / hyper.correction2**0.5
    return denominator.add_(hyper.eps)
