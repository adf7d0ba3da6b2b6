"""Gradients in half precision beside weights in float32, as engines hand them over and torch takes
them where ``param.grad_dtype`` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weyl_megatron import AdamW2

INFINITE = float("inf")

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this torch takes gradients in the weight's dtype"
)


def halved(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    parameter.grad_dtype = dtype
    return parameter


OPTIONS: dict[str, dict[str, Any]] = {
    "certified": {"tau": 1e6},
    "clipped": {"tau": 0.01, "lr": 0.5},
    "plain": {"tau": INFINITE},
    "maximize": {"tau": 0.01, "lr": 0.5, "maximize": True},
    "amsgrad": {"tau": 0.01, "lr": 0.5, "amsgrad": True},
    "guarded": {"tau": 0.01, "nonfinite": "raise"},
}

WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(9, 7),
    "vector": lambda: torch.randn(11),
    "transposed": lambda: torch.randn(7, 9).T,
    "every other column": lambda: torch.randn(9, 14)[:, ::2],
    "channels_last": lambda: torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_half_precision_steps_as_the_same_in_float32(
    dtype: torch.dtype, option: str, kind: str
) -> None:
    def run(*, convert: bool) -> list[Tensor]:
        torch.manual_seed(0)
        weight = nn.Parameter(WEIGHTS[kind]())
        optimizer = AdamW2([("w", weight)], **OPTIONS[option])
        for number in range(4):
            grad = torch.randn(weight.shape).to(dtype)
            weight.grad_dtype = torch.float32 if convert else dtype
            weight.grad = grad.float() if convert else grad
            if number == 3:
                optimizer.measure_gradients()
            optimizer.step()
        norms = optimizer.gradient_norms().values()
        return [weight.detach(), *optimizer.state[weight].values(), torch.tensor(list(norms))]

    *found, norms = run(convert=False)
    *expected, wanted = run(convert=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Both are taken in float32, in another order.
    assert torch.allclose(norms, wanted, rtol=1e-6, atol=0)


def test_gradients_of_several_dtypes_may_stand_beside_each_other() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]

    def run(*, convert: bool) -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(9, 7)) for _ in dtypes]
        optimizer = AdamW2(params, lr=0.01, maximize=True, nonfinite="skip")
        for _ in range(3):
            for param, dtype in zip(params, dtypes, strict=True):
                param.grad_dtype = None
                grad = torch.randn(9, 7).to(dtype)
                param.grad = grad.float() if convert else grad
            optimizer.step()
        return [param.detach() for param in params]

    pairs = zip(run(convert=False), run(convert=True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_gradient_in_half_precision_that_is_not_finite_is_seen() -> None:
    weight = halved(nn.Parameter(torch.ones(9, 7)), torch.float16)
    weight.grad = torch.full((9, 7), INFINITE, dtype=torch.float16)
    optimizer = AdamW2([("w", weight)], nonfinite="skip")
    optimizer.step()
    assert optimizer.skipped_steps == 1 and torch.equal(weight, torch.ones(9, 7))


@pytest.mark.parametrize("tau", [0.01, INFINITE])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_a_gradient_of_any_other_dtype_than_its_weight_s_is_refused(
    dtype: torch.dtype, other: torch.dtype, tau: float
) -> None:
    weight = halved(nn.Parameter(torch.ones(9, 7, dtype=dtype)), other)
    weight.grad = torch.ones(9, 7, dtype=other)
    with pytest.raises(ValueError, match=f"the gradient of parameter 'w' is .*{other}.*{dtype}"):
        AdamW2([("w", weight)], tau=tau).step()
    assert torch.equal(weight, torch.ones(9, 7, dtype=dtype))
