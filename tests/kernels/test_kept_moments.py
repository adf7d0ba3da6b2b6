"""M and V in another dtype than their weight's, in every kernel: U is formed of what is stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.kernels.cases import Case, Rank, State, on_every_rank
from tests.kernels.interpreter import few_iterations, quick_interpreter
from weyl_megatron import AdamW2
from weyl_megatron.kernels.choice import VARIABLE

#: The kernels beside plain torch: Triton's under its interpreter, from test_choice.py.
KERNEL = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
KERNELS = [KERNEL] if KERNEL == "triton" else ["torch", KERNEL]
KEPT: list[Any] = ["bfloat16", ["bfloat16", "float32"], ["float32", "bfloat16"]]
#: state_dtype, τ and clip; the interpreter takes long for each.
CASES = [
    *((kept, tau, clip) for kept in KEPT for tau in (0.02, 1e6) for clip in ("scale", "project"))
]
if KERNEL == "triton":
    CASES = [("bfloat16", 0.02, "project"), (KEPT[1], 0.02, "scale"), (KEPT[2], 1e6, "scale")]
#: What M and V that are cut off, not rounded, make of a move by 0.01: see test_every_kernel_….
CUT_OFF = 2**-7 * 1e-2
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
SHAPES = ((16, 24), (9, 7), (11,)) if KERNEL == "triton" else ((16, 24), (9, 7), (5, 33), (11,))


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tolerances.every_iteration():
        if KERNEL == "cpu":
            yield
            return
        with quick_interpreter(), few_iterations():
            yield


def gradient(param: Tensor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(param.shape, generator=generator)


class Run:
    """A few parameters, stepped."""

    def __init__(
        self,
        kernel: str,
        monkeypatch: pytest.MonkeyPatch,
        dtype: Any = torch.float32,
        **options: Any,
    ) -> None:
        monkeypatch.setenv(VARIABLE, kernel)
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(dtype))
            for shape in SHAPES
        ]
        named = [(f"w{number}", param) for number, param in enumerate(self.params)]
        given = {"lr": 1e-2, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "tau": 0.02}
        self.optimizer = AdamW2(named, **{**given, **options})

    def step(self, count: int = 1, seed: int = 0) -> None:
        for number in range(count):
            for place, param in enumerate(self.params):
                param.grad = gradient(param, 100 * (seed + number) + place).to(param.dtype)
            self.optimizer.step()

    def kept(self, key: str) -> list[Tensor]:
        return [self.optimizer.state[param][key] for param in self.params]


@pytest.mark.parametrize(("kept", "tau", "clip"), CASES)
def test_every_kernel_steps_them_as_plain_torch_does(
    kept: Any, tau: float, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32's rounding; where M or V before they are rounded differ in a last bit, a few are
    rounded otherwise: the interpreter cuts off what a GPU rounds, so there all may be.
    """
    options = {"io": [], "vectors": 4} if clip == "project" else {}
    runs = [
        Run(kernel, monkeypatch, tau=tau, clip=clip, state_dtype=kept, **options)
        for kernel in ("torch", KERNEL)
    ]
    for kernel, run in zip(("torch", KERNEL), runs, strict=True):
        monkeypatch.setenv(VARIABLE, kernel)
        run.step(1 if KERNEL == "triton" else 4)
    for expected, param in zip(runs[0].params, runs[1].params, strict=True):
        limit = 2e-7 if KERNEL == "cpu" else CUT_OFF
        assert torch.allclose(param, expected, rtol=0, atol=limit)
    first, second = (kept, kept) if isinstance(kept, str) else kept
    for key, dtype in (("exp_avg", first), ("exp_avg_sq", second)):
        for expected, moment in zip(runs[0].kept(key), runs[1].kept(key), strict=True):
            assert moment.dtype == expected.dtype == getattr(torch, dtype)
            pair = moment.double(), expected.double()
            assert torch.allclose(*pair, rtol=2**-7 if dtype == "bfloat16" else 1e-5, atol=1e-12)
    entries = [run.optimizer.stats() for run in runs]
    for name, entry in entries[0].items():
        assert entries[1][name].clipped == entry.clipped == (tau < 1)
        assert entries[1][name].sigma_update == pytest.approx(entry.sigma_update, rel=5e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_update_is_made_of_what_is_stored(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(kernel, monkeypatch, state_dtype="bfloat16", tau=1e6)
    run.step()
    before = [param.detach().double() for param in run.params]
    run.step(seed=1)
    for param, old, m, v in zip(
        run.params, before, run.kept("exp_avg"), run.kept("exp_avg_sq"), strict=True
    ):
        root = (v.double() / (1 - BETAS[1] ** 2)).sqrt() + EPS
        update = m.double() / (1 - BETAS[0] ** 2) / root
        expected = old * (1 - 1e-2 * DECAY) - 1e-2 * update
        # Formed of M and V that are not rounded it would be off by up to 2⁻⁸ of 1e-2.
        assert torch.allclose(param.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ranks_that_share_a_row_step_it_as_one_process_does(kernel: str) -> None:
    """As ZeRO cuts it: within the fourth row of the first matrix, and between M's two bytes."""
    case = Case({"w": (9, 16), "v": (5, 7)}, cuts=(52.5 / 179,), gap=1)
    options: dict[str, Any] = {"state_dtype": "bfloat16"}
    whole = on_every_rank(case._replace(cuts=()), kernel, _two_steps, **options)[0]
    ranks = on_every_rank(case, kernel, _two_steps, **options)
    weights = torch.cat([state.tensors[1] for state in ranks])
    # α_W is that of σ₁, which is summed in another order.
    assert torch.allclose(weights, whole.tensors[1], rtol=0, atol=1e-7)
    for moment in (2, 3):
        cut = torch.cat([state.tensors[moment] for state in ranks])
        assert cut.dtype == torch.bfloat16 and torch.equal(cut, whole.tensors[moment])


def _two_steps(rank: Rank) -> State:
    rank.step(1e-2)
    return rank.step(1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_that_is_taken_back_leaves_what_is_stored(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate expects the third step to be settled, and it is not."""
    run = Run(kernel, monkeypatch, state_dtype="bfloat16", lr=1e-6)
    run.step(2)
    run.optimizer.param_groups[0]["lr"] = 1e-2
    run.step(seed=2)
    assert all(entry.clipped for entry in run.optimizer.stats().values())
    again = Run("torch", monkeypatch, state_dtype="bfloat16", lr=1e-6)
    again.step(2)
    again.optimizer.forget()
    again.optimizer.param_groups[0]["lr"] = 1e-2
    again.step(seed=2)
    for param, expected in zip(run.params, again.params, strict=True):
        # α_W is of σ₁ of vectors that made fewer iterations.
        limit = 2e-5 if KERNEL == "cpu" else CUT_OFF
        assert torch.allclose(param, expected, rtol=1e-3, atol=limit)


def test_weights_in_bfloat16_may_have_moments_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "triton" if KERNEL == "triton" else "torch"
    run = Run(kernel, monkeypatch, torch.bfloat16, state_dtype="float32", tau=1e6)
    run.step()
    before = [param.detach().double() for param in run.params]
    run.step(seed=1)
    for param, old, m, v in zip(
        run.params, before, run.kept("exp_avg"), run.kept("exp_avg_sq"), strict=True
    ):
        assert m.dtype == v.dtype == torch.float32
        update = m.double() / (1 - BETAS[0] ** 2)
        update /= (v.double() / (1 - BETAS[1] ** 2)).sqrt() + EPS
        decayed = old * (1 - 1e-2 * DECAY)
        # torch rounds what is decayed, and then what is moved; the interpreter cuts off.
        limit = 2**-8 * (decayed.abs() + (decayed - 1e-2 * update).abs()) + 1e-6
        assert ((param.double() - decayed + 1e-2 * update).abs() <= 2 * limit).all()
