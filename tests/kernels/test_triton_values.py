"""What Triton's kernels read and keep: dtypes, blocks of any width, odd numbers, checkpoints; under
Triton's interpreter.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.kernels.interpreter import few_iterations, needs_interpreter, quick_interpreter
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.kernels.choice import VARIABLE

pytestmark = needs_interpreter

BETAS, DECAY, EPS = (0.9, 0.95), 0.1, 1e-8
OPTIONS: dict[str, Any] = {"betas": BETAS, "weight_decay": DECAY, "eps": EPS, "tau": 0.02}

has_grad_dtype = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this torch takes gradients in the weight's dtype"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "triton")
    with quick_interpreter(), tolerances.every_iteration():
        yield


def made(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[AdamW2, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(dtype)) for shape in shapes
    ]
    named = [(f"w{number}", param) for number, param in enumerate(params)]
    return AdamW2(named, **{"lr": 1e-2, **OPTIONS, **options}), params


def gradients(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    return [torch.randn(param.shape, generator=generator) for param in params]


def step(optimizer: AdamW2, params: Sequence[nn.Parameter], seed: int, lr: float = 1e-2) -> None:
    for param, grad in zip(params, gradients(params, seed), strict=True):
        param.grad = grad.to(param.dtype)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def kept(optimizer: AdamW2, params: Sequence[Tensor]) -> list[Tensor]:
    """Return W, M and V."""
    moments = [optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq")]
    return [*(param.detach() for param in params), *moments]


def exact(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().double(), 2))


def update(optimizer: AdamW2, param: Tensor, count: int) -> Tensor:
    """Return U of the last step, in float64."""
    state = optimizer.state[param]
    m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()
    root = (v / (1 - BETAS[1] ** count)).sqrt() + EPS
    return m / (1 - BETAS[0] ** count) / root


@has_grad_dtype
def test_a_gradient_in_half_precision_steps_as_the_same_in_float32() -> None:
    """Beside each other, too: bit for bit, in steps that clip and in one that is settled."""
    shapes = [(10, 24), (9, 7), (11,), (5, 6)]
    dtypes = [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]

    def run(*, convert: bool) -> list[Tensor]:
        optimizer, params = made(shapes)
        with few_iterations():
            for number, lr in enumerate([1e-2, 1e-2, 1e-7]):
                for param, grad, dtype in zip(
                    params, gradients(params, number), dtypes, strict=True
                ):
                    param.grad_dtype = torch.float32 if convert else dtype
                    param.grad = grad.to(dtype).to(param.grad_dtype)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
        assert all(entry.certified for entry in optimizer.stats().values())
        return kept(optimizer, params)

    # Units of other dtypes are other launches: the same sums in the same order.
    pairs = zip(run(convert=False), run(convert=True), strict=True)
    assert all(torch.equal(tensor, twin) for tensor, twin in pairs)


@pytest.mark.parametrize("tau", [0.02, 1e6])
def test_weights_in_bfloat16_are_stepped_in_float32_and_rounded_once(tau: float) -> None:
    shapes = [(10, 24), (9, 7), (11,)]
    # So large that a part left out would be more than a rounding.
    lr, decay = 0.1, 1.0
    optimizer, params = made(shapes, torch.bfloat16, tau=tau, weight_decay=decay)
    with few_iterations():
        step(optimizer, params, 0, lr)
        befores = [tensor.float().clone() for tensor in kept(optimizer, params)]
        step(optimizer, params, 1, lr)
    weights, moments = befores[: len(params)], befores[len(params) :]
    for number, (param, grad) in enumerate(zip(params, gradients(params, 1), strict=True)):
        grad = grad.bfloat16().float()
        m, v = moments[2 * number : 2 * number + 2]
        m = (m + (1 - BETAS[0]) * (grad - m)).bfloat16()
        v = (v * BETAS[1] + (1 - BETAS[1]) * grad * grad).bfloat16()
        state = optimizer.state[param]
        assert near_in_bfloat16(state["exp_avg"], m) and near_in_bfloat16(state["exp_avg_sq"], v)
        entry = optimizer.stats().get(f"w{number}")
        rate = lr if entry is None else entry.lr
        expected = weights[number].double() * (1 - rate * decay)
        expected -= rate * update(optimizer, param, 2)
        assert near_in_bfloat16(param.detach(), expected.bfloat16())
        if entry is not None:
            assert entry.clipped == (tau < 1)
            # Of vectors from three iterations and two more.
            assert entry.sigma_weight == pytest.approx(exact(weights[number]), rel=0.05)
            assert entry.sigma_update == pytest.approx(exact(update(optimizer, param, 2)), rel=0.05)


def near_in_bfloat16(tensor: Tensor, expected: Tensor) -> bool:
    """Whether bfloat16 numbers are equal or neighbours: the interpreter cuts off what a GPU
    rounds.
    """
    assert tensor.dtype == expected.dtype == torch.bfloat16
    return torch.allclose(tensor.double(), expected.double(), rtol=2**-7, atol=0)


def test_weights_in_bfloat16_stand_beside_those_in_float32() -> None:
    """Each as if it were alone."""
    with few_iterations():
        halves, of_halves = made([(9, 7)], torch.bfloat16)
        wholes, of_wholes = made([(9, 7), (6, 8)])
        both = [nn.Parameter(param.detach().clone()) for param in (of_halves[0], of_wholes[1])]
        mixed = AdamW2([("w0", both[0]), ("w1", both[1])], lr=1e-2, **OPTIONS)
        for number in range(2):
            for param, grad in zip(both, gradients(of_wholes, number), strict=True):
                param.grad = grad.to(param.dtype)
            mixed.step()
            step(halves, of_halves, number)
            step(wholes, of_wholes, number)
    assert torch.equal(both[0], of_halves[0])
    # Its units are cut otherwise beside another one.
    assert torch.allclose(both[1], of_wholes[1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_blocks_of_any_width_find_sigma(width: int) -> None:
    # At this rate nothing is clipped.
    options: dict[str, Any] = {"clip": "project", "vectors": width, "io": []}
    optimizer, params = made([(24, 40), (5, 17)], **(options if width > 4 else {}))
    befores = [param.detach().clone() for param in params]
    step(optimizer, params, 0, lr=1e-4)
    (group,) = optimizer._matrix_groups
    for number, (param, before) in enumerate(zip(params, befores, strict=True)):
        entry = optimizer.stats()[f"w{number}"]
        u, sigma = update(optimizer, param, 1), exact(before)
        assert entry.sigma_weight == pytest.approx(sigma, rel=1e-3)
        assert entry.sigma_weight <= sigma * (1 + 1e-5), "it is a lower bound, but for rounding"
        assert entry.sigma_update == pytest.approx(exact(u), rel=1e-3)
        expected = before.double() * (1 - entry.lr * DECAY) - entry.lr * u
        assert torch.allclose(param.double(), expected, rtol=0, atol=1e-7)
        for operand in group._power.blocks.operands:
            block = operand.block(number).double()
            assert len(block) == min(operand.widths[number], *param.shape)
            eye = torch.eye(len(block), dtype=torch.float64)
            assert torch.allclose(block @ block.T, eye, rtol=0, atol=1e-5)


ODD: dict[str, Callable[[Tensor, Tensor], None]] = {
    "zero": lambda w, g: (w.zero_(), g.zero_()),
    "zero weights": lambda w, g: w.zero_(),
    "an infinite weight": lambda w, g: w.view(-1)[3].fill_(float("inf")),
    "a weight that is no number": lambda w, g: w.view(-1)[3].fill_(float("nan")),
    "a gradient that is no number": lambda w, g: g.view(-1)[3].fill_(float("nan")),
    "an infinite gradient": lambda w, g: g.view(-1)[3].fill_(float("inf")),
    "tiny": lambda w, g: (w.mul_(1e-30), g.mul_(1e-30)),
    "huge": lambda w, g: w.mul_(1e30),
    "rank 1": lambda w, g: w.copy_(w[:, :1] @ w[:1]),
}


@cache
def pair(kernel: str, what: str | None) -> tuple[list[Tensor], dict[str, MatrixStats]]:
    """Return two matrices after two steps, the first of which is odd, and what was done."""
    with few_iterations(4), patch.dict("os.environ", {VARIABLE: kernel}):
        optimizer, params = made([(6, 10), (7, 8)])
        for number in range(2):
            grads = gradients(params, number)
            if what is not None and number == 0:
                with torch.no_grad():
                    ODD[what](params[0], grads[0])
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
    return [param.detach() for param in params], optimizer.stats()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("what", ODD)
def test_a_matrix_of_odd_numbers_is_stepped_as_by_plain_torch_and_leaves_others_alone(
    what: str,
) -> None:
    (odd, other), stats = pair("triton", what)
    (expected, _), expected_stats = pair("torch", what)
    (_, alone), alone_stats = pair("triton", None)
    assert torch.equal(other, alone) and stats["w1"] == alone_stats["w1"]
    assert torch.equal(odd.isnan(), expected.isnan())
    size = float(expected.abs().nan_to_num(0, 0, 0).max())
    # Roundings of iterations that begin anew at another length of the vectors.
    close = torch.isclose(odd, expected, rtol=0, atol=1e-5 * size, equal_nan=True)
    assert bool(close.all()), (stats["w0"], expected_stats["w0"])


def test_a_checkpoint_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another kernel to roundings; saved after clipped and settled steps."""
    rates = [1e-2, 1e-2, 1e-7, 1e-7, 1e-2]
    with few_iterations():
        optimizer, params = made([(9, 14), (7, 8), (5,)])
        for number in range(3):
            step(optimizer, params, number, rates[number])
        saved = copy.deepcopy(optimizer.state_dict())
        weights = [param.detach().clone() for param in params]
        for number in range(3, 5):
            step(optimizer, params, number, rates[number])
        for kernel in ("triton", "torch", "cpu"):
            monkeypatch.setenv(VARIABLE, kernel)
            resumed, others = made([(9, 14), (7, 8), (5,)])
            with torch.no_grad():
                for param, weight in zip(others, weights, strict=True):
                    param.copy_(weight)
            resumed.load_state_dict(copy.deepcopy(saved))
            for number in range(3, 5):
                step(resumed, others, number, rates[number])
                if number == 3:
                    assert all(entry.certified for entry in resumed.stats().values())
            for tensor, twin in zip(kept(resumed, others), kept(optimizer, params), strict=True):
                if kernel == "triton":
                    assert torch.equal(tensor, twin)
                # Two steps' roundings.
                assert torch.allclose(tensor, twin, rtol=0, atol=1e-6 * float(twin.abs().max()))


def test_a_gradient_does_not_outlive_the_step() -> None:
    optimizer, params = made([(9, 7)])
    with few_iterations():
        step(optimizer, params, 0)
    gone = weakref.ref(params[0].grad)
    params[0].grad = None
    assert optimizer.stats() and gone() is None, "its memory is missing in the next backward pass"
