"""Sharpness: the top eigenvalue of a loss's Hessian, raw or as Adam's preconditioner sees it.

Lanczos's method on Hessian-vector products, which are one backward pass through the gradient's own
graph. Full-batch gradient descent of rate α is stable while the sharpness is below 2 / α, Adam
while that of P^(-1/2) H P^(-1/2) is below ``adam_threshold`` (Cohen et al. 2022, "Adaptive Gradient
Methods at the Edge of Stability"). The graph, and one vector of all parameters per iteration, are
kept in memory; a function that torch compiled, or a kernel without a second derivative, stops with
torch's own message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PARTITIONED = (
    "sharpness: parameter {number} is partitioned, it takes whole parameters (torch, DDP, ZeRO 0 "
    "to 2)."
)

#: What torch puts into a graph where tensor parallelism changes how a tensor is spread. Backward it
#: is computed without a graph of its own, so that second derivatives lack all of it.
_REDISTRIBUTED = ("RedistributeBackward", "_FromTorchTensorBackward", "_ToTorchTensorBackward")

__all__ = ["adam_preconditioner", "adam_threshold", "sharpness"]


def sharpness(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    iterations: int = 20,
    preconditioner: Sequence[Tensor] | None = None,
    group: ProcessGroup | None = None,
    seed: int = 0,
    tol: float = 1e-3,
) -> float:
    """Return the largest eigenvalue, not the largest absolute one, of a loss's Hessian H.

    Collective over ``group``. Nothing is left in ``.grad``; dropout and buffers are what the
    caller's ``loss`` makes of them. It calls ``loss`` once, under attention's math kernel, which
    alone has a second derivative.

    Args:
        loss: returns a scalar; with ``group`` the mean over this rank's part of the batch, all
            parts of one size.
        parameters: whole, as in plain torch, DDP and ZeRO 0 to 2. In bfloat16 so are the products.
        iterations: Hessian-vector products at most.
        preconditioner: D > 0 in the shapes of ``parameters``: the eigenvalue is that of
            D^(-1/2) H D^(-1/2).
        group: ranks that hold the same parameters; H is that of the global batch.
        seed: of the start vector, the same on every rank.
        tol: it stops where an eigenvalue is proved to lie within this share of the estimate.

    Raises:
        ValueError: parameters that are partitioned or have no gradient, a loss that is no scalar or
            that torch's tensor parallelism computes, a bad number.
    """
    parameters = list(parameters)
    _check(parameters, iterations, tol)
    scale = None if preconditioner is None else _inverse_root(parameters, list(preconditioner))
    product, size = _hessian(loss, parameters, group)
    device = parameters[0].device
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    # Drawn on the CPU, so that every rank and every device starts alike.
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    def scaled(vector: Tensor) -> Tensor:
        if scale is None:
            return product(vector).to(dtype)
        return scale * product(scale * vector).to(dtype)

    return _lanczos(scaled, start, min(iterations, size), tol, group)


def adam_preconditioner(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Return Adam's preconditioner (1 − β₁ᵗ)(√V̂ + ε) after step t, V̂ = V / (1 − β₂ᵗ).

    It has the shapes of ``parameters``. This is P of Cohen et al. 2022 (section 2): with it Adam is
    θ ← θ − α P⁻¹ M, where M is the moving average of gradients as it is kept, not bias-corrected;
    hence the factor in front, which tends to 1.

    Args:
        optimizer: ``AdamW2``, ``torch.optim.AdamW`` or one that keeps ``exp_avg_sq`` and ``step``
            likewise.
        parameters: those that the optimizer steps, after its first step.

    Raises:
        ValueError: a parameter that the optimizer does not step itself, as under ZeRO, or has not
            stepped yet.
    """
    groups: dict[int, dict[str, Any]] = {
        id(p): group for group in optimizer.param_groups for p in group["params"]
    }
    result = []
    for number, parameter in enumerate(parameters):
        group, state = groups.get(id(parameter)), optimizer.state.get(parameter, {})
        second = state.get("exp_avg_sq")
        if group is None or second is None or second.shape != parameter.shape:
            raise ValueError(
                f"sharpness: parameter {number} of shape {tuple(parameter.shape)} has no second "
                f"moment in {type(optimizer).__name__}; it takes the very parameters that the "
                "optimizer steps, after a step."
            )
        beta1, beta2 = group["betas"]
        step = float(state["step"] if "step" in state else group["step"])
        if step < 1:
            raise ValueError(f"sharpness: the optimizer's step got {step:g}, it takes 1 or more.")
        second = second.detach()
        second = second if second.dtype == torch.float64 else second.float()
        result.append((1 - beta1**step) * ((second / (1 - beta2**step)).sqrt() + group["eps"]))
    return result


def adam_threshold(lr: float, beta1: float) -> float:
    """Return (2 + 2β₁) / ((1 − β₁) α), 38 / α at β₁ = .9.

    Where the preconditioned sharpness is below, Adam is stable. Derived for a P that stands still,
    from the eigenvalues of EMA-style heavy ball (Cohen et al. 2022, section 3).
    """
    if not (0 < lr < float("inf") and 0 <= beta1 < 1):
        raise ValueError(
            f"sharpness: lr and beta1 got {lr!r} and {beta1!r}, they take lr > 0 and 0 <= beta1 < "
            "1."
        )
    return (2 + 2 * beta1) / ((1 - beta1) * lr)


def _check(parameters: Sequence[Tensor], iterations: int, tol: float) -> None:
    if not parameters:
        raise ValueError("sharpness: parameters got none, it takes one or more.")
    for number, parameter in enumerate(parameters):
        is_away = hasattr(parameter, "ds_id") and parameter.numel() == 0
        kinds = {base.__name__ for base in type(parameter).__mro__}
        if is_away or kinds & {"DTensor", "FlatParameter"}:
            raise ValueError(_PARTITIONED.format(number=number))
        if not parameter.requires_grad or not parameter.is_floating_point():
            raise ValueError(
                f"sharpness: parameter {number} is {parameter.dtype} with "
                f"requires_grad={parameter.requires_grad}, it takes floats that require a gradient."
            )
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(
            f"sharpness: iterations got {iterations!r}, it takes a whole number from 1 on."
        )
    if not tol >= 0:
        raise ValueError(f"sharpness: tol got {tol!r}, it takes a number from 0 on.")


def _inverse_root(parameters: Sequence[Tensor], preconditioner: Sequence[Tensor]) -> Tensor:
    """Return the diagonal of D^(-1/2), flat."""
    shapes = [tuple(d.shape) for d in preconditioner]
    expected = [tuple(p.shape) for p in parameters]
    if shapes != expected:
        raise ValueError(
            f"sharpness: preconditioner got the shapes {shapes}, it takes those of parameters, "
            f"{expected}."
        )
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    device = parameters[0].device
    flat = torch.cat([d.detach().reshape(-1).to(device, dtype) for d in preconditioner])
    if not bool((flat > 0).all()):
        raise ValueError(
            f"sharpness: preconditioner got {float(flat.min())!r}, it takes numbers above 0."
        )
    return flat.rsqrt()


def _hessian(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], group: ProcessGroup | None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return v ↦ H v on flat vectors, averaged over ``group``, and their length."""
    device = parameters[0].device
    sizes = [p.numel() for p in parameters]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss()
        if value.numel() != 1:
            raise ValueError(
                f"sharpness: loss returned the shape {tuple(value.shape)}, it takes a scalar."
            )
        _refuse_redistributed(value)
        first = torch.autograd.grad(value.sum(), parameters, create_graph=True, allow_unused=True)
    # FSDP2's parameters, whole from a forward pass on, are freed by the backward pass.
    for number, parameter in enumerate(parameters):
        if parameter.numel() and not parameter.untyped_storage().nbytes():
            raise ValueError(_PARTITIONED.format(number=number))
    # The gradient of what the loss does not depend on, or depends on linearly alone, has no second
    # derivative.
    curved = {n: g for n, g in enumerate(first) if g is not None and g.requires_grad}

    def product(vector: Tensor) -> Tensor:
        parts = torch.split(vector, sizes)
        pieces: Sequence[Tensor | None] = [None] * len(parameters)
        if curved:
            directions = [
                parts[number].view_as(gradient).to(gradient.device, gradient.dtype)
                for number, gradient in curved.items()
            ]
            gradients = list(curved.values())
            pieces = torch.autograd.grad(
                gradients, parameters, directions, retain_graph=True, allow_unused=True
            )
        flat = [torch.zeros_like(part) for part in parts]
        for number, piece in enumerate(pieces):
            if piece is not None:
                flat[number] = piece.detach().reshape(-1).to(device, vector.dtype)
        result = torch.cat(flat)
        if group is not None:
            dist.all_reduce(result, group=group)
            result /= dist.get_world_size(group)
        return result

    return product, sum(sizes)


def _refuse_redistributed(value: Tensor) -> None:
    """Raise ValueError where torch's tensor parallelism is in the graph of a loss."""
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _REDISTRIBUTED:
            raise ValueError(
                f"sharpness: loss has {node.name()} in its graph, of torch's tensor parallelism, "
                "which has no second derivative; it takes a model that is whole on every rank."
            )
        nodes += [before for before, _ in node.next_functions]


def _lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    tol: float,
    group: ProcessGroup | None,
) -> float:
    """Return the largest eigenvalue of a symmetric map on vectors like ``start``.

    After ``steps`` products at most.
    """
    basis = [start / start.norm()]
    tiny = 100 * torch.finfo(start.dtype).eps
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        new = product(basis[-1])
        diagonal.append(float(basis[-1] @ new))
        for _ in range(2):  # once more, for what rounding left
            for vector in basis:
                new = new - (vector @ new) * vector
        length = float(new.norm())
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            small += torch.diag(off, 1) + torch.diag(off, -1)
        is_finite = bool(small.isfinite().all())
        value, residual, largest = float("nan"), 0.0, 0.0
        if is_finite:
            values, vectors = torch.linalg.eigh(small)
            value, largest = float(values[-1]), float(values.abs().max())
            residual = length * abs(float(vectors[-1, -1]))
        # Within the residual of the estimate lies an eigenvalue. A length of rounding's size:
        # nothing is left to reach.
        is_settled = residual <= tol * abs(value) or length <= tiny * largest
        is_done = not is_finite or is_settled or len(basis) >= steps
        if _agreed(is_done, start.device, group):
            return value
        beside.append(length)
        basis.append(new / max(length, torch.finfo(start.dtype).tiny))


def _agreed(is_done: bool, device: torch.device, group: ProcessGroup | None) -> bool:
    """Whether any rank is done.

    Sums that differ in the last bit must not make one of them wait for the others.
    """
    if group is None:
        return is_done
    flag = torch.tensor(float(is_done), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag > 0)
