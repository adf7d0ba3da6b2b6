"""Inputs that training does not promise to spare an optimizer, each step judged by exact singular
values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.processes import run_ranks
from weyl_megatron import AdamW2
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.reference import AdamW2Reference, exact_sigma

Say = Callable[[str, str], None]

OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1, "tau": 0.01}

#: Of matrices with a side of 4 or less the vectors span everything; what is left is that a
#: direction which is parallel to the others but for 1 % is not counted (``ritz.INDEPENDENT``), 1e-4
#: of σ₁ at most.
SIGMA = 2e-4
ROUNDING = 4 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, params=["cpu", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernel takes float32 alone; tests of other dtypes ask for plain torch."""
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def say(kernel: str, record_property: Callable[[str, object], None]) -> Say:
    """What was tried and what survived, for the table of `make faults`."""

    def of_kernel(tried: str, survived: str) -> None:
        record_property("tried", f"{tried} (kernel {kernel})")
        record_property("survived", survived)

    return of_kernel


class Judge:
    """Algorithm 1 with exact σ₁ beside AdamW2, from the same weights at every step.

    The reference has a step count per parameter, as torch has, so there is one of them for each.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], **options: Any) -> None:
        self.params = dict(named)
        self.twins = {name: p.detach().clone().requires_grad_() for name, p in named}
        self.references = {
            name: AdamW2Reference(
                [(name, twin)], **{**OPTIONS, **options}, sigma=lambda *_: exact_sigma
            )
            for name, twin in self.twins.items()
        }
        self.worst = 0.0

    def step(
        self,
        optimizer: AdamW2,
        grads: dict[str, Tensor | None],
        rounding: float = ROUNDING,
        sigma: float = SIGMA,
    ) -> None:
        rates: dict[str, float] = {}
        for name, p in self.params.items():
            grad = grads[name]
            p.grad = None if grad is None else grad.to(p.dtype)
            twin = self.twins[name]
            twin.data.copy_(p.detach())
            twin.grad = None if p.grad is None else p.grad.clone()
            if grad is not None:
                rates |= self.references[name].step()
        optimizer.step()
        stats = optimizer.stats()
        for name, p in self.params.items():
            twin = self.twins[name]
            assert p.isfinite().all(), name
            if name in stats and name in rates:
                off = abs(stats[name].lr / rates[name] - 1)
                self.worst = max(self.worst, off)
                assert off <= max(sigma, rounding), (name, stats[name], rates[name])
            # No element of U is above (1 − β₁) / √(1 − β₂), which is below 5 here.
            allowed = rounding * float(p.detach().abs().max()) + 5 * max(
                sigma, rounding
            ) * rates.get(name, 0.0)
            assert float((twin.detach() - p.detach()).abs().max()) <= allowed, name


def parameter(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter((torch.randn(shape) * scale).to(dtype))


def noise(
    named: Sequence[tuple[str, nn.Parameter]], scale: float = 1.0
) -> dict[str, Tensor | None]:
    return {name: torch.randn(p.shape) * scale for name, p in named}


EMPTY = {
    "rows": (0, 5),
    "columns": (5, 0),
    "vector": (0,),
    "stack": (0, 3, 4),
    "experts": (2, 0, 4),
    "conv": (0, 3, 2, 2),
}


@pytest.mark.parametrize("beside", [True, False], ids=["beside a matrix", "alone"])
def test_parameters_of_size_zero_are_passed_over(beside: bool, say: Say) -> None:
    torch.manual_seed(0)
    empty = [(name, parameter(*shape)) for name, shape in EMPTY.items()]
    full = [("w", parameter(6, 4)), ("scalar", parameter())] if beside else []
    optimizer = AdamW2([*empty, *full], **OPTIONS)
    judge = Judge(full)
    for _ in range(4):
        for _, p in empty:
            p.grad = torch.zeros_like(p)
        judge.step(optimizer, noise(full))
    assert set(optimizer.stats()) == ({"w"} if beside else set())
    again = AdamW2([*empty, *full], **OPTIONS)
    again.load_state_dict(optimizer.state_dict())
    again.step()
    say(
        f"parameters of shape {', '.join(map(str, EMPTY.values()))}, 4 steps and a checkpoint",
        f"passed over; the others follow exact arithmetic to {judge.worst:.0e}",
    )


def test_parameters_of_size_zero_take_no_share_of_the_auto_budget(say: Say) -> None:
    torch.manual_seed(0)
    named = [("w", parameter(6, 4)), *((name, parameter(*shape)) for name, shape in EMPTY.items())]
    optimizer = AdamW2(named, lr=1.0, tau="auto", io=[])
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {name: entry.tau for name, entry in optimizer.stats().items()} == {"w": 0.144}
    say(
        "tau='auto' with one matrix and six parameters of size zero",
        "the matrix has the whole budget",
    )


def test_vectors_of_size_zero_and_scalars_are_not_clipped(say: Say) -> None:
    named = [
        ("none", parameter(0)),
        ("one", nn.Parameter(torch.tensor(1.0))),
        ("three", nn.Parameter(torch.ones(3))),
    ]
    optimizer = AdamW2(named, lr=0.1, tau=0.01, weight_decay=0.0, clip_vectors=True)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.stats()) == {"three"}
    assert named[1][1].item() == pytest.approx(0.9) and named[2][1].tolist() == pytest.approx(
        [0.99] * 3
    )
    say(
        "clip_vectors with an empty vector and a scalar",
        "both take the scheduled rate",
    )


def test_matrices_of_one_row_or_column_follow_the_reference(say: Say) -> None:
    torch.manual_seed(0)
    named = [
        (f"{m}x{n}", parameter(m, n))
        for m, n in ((1, 7), (7, 1), (1, 1), (1, 40), (40, 1), (2, 33))
    ]
    optimizer, judge = AdamW2(named, **OPTIONS), Judge(named)
    for _ in range(8):
        judge.step(optimizer, noise(named))
    assert set(optimizer.stats()) == {name for name, _ in named}
    say(
        "matrices of 1×7, 7×1, 1×1, 1×40, 40×1, 2×33, 8 steps",
        f"every rate is the exact one to {judge.worst:.0e}",
    )


@pytest.mark.parametrize(
    (
        "weights",
        "floor_std",
    ),  # σ₁ of numbers of one bit has no digits to compare: they have the floor
    [(1e-42, 1e-3), (1e-30, 1e-3), (1e30, 1e-3), (1e-30, 0.0), (1e30, 0.0)],
    ids=str,
)
@pytest.mark.parametrize("gradients", [1e-30, 1.0, 1e15], ids=str)
def test_matrices_of_any_size_follow_the_reference(
    weights: float, gradients: float, floor_std: float, say: Say
) -> None:
    torch.manual_seed(0)
    named = [("w", parameter(6, 4, scale=weights)), ("row", parameter(1, 5, scale=weights))]
    optimizer = AdamW2(named, **OPTIONS, floor_std=floor_std)
    judge = Judge(named, floor=lambda rows, cols: floor_std * (rows**0.5 + cols**0.5))
    for _ in range(6):
        judge.step(optimizer, noise(named, gradients))
    say(
        f"weights of {weights:g}, gradients of {gradients:g}, floor_std {floor_std:g}, 6 steps",
        f"every rate is the exact one to {judge.worst:.0e}",
    )


@pytest.mark.parametrize("gradients", [1e-42, 1e-30, 1e19, 1e25, 1e30], ids=str)
def test_gradients_of_any_size_move_weights_as_adamw_does_where_nothing_is_clipped(
    gradients: float, say: Say
) -> None:
    """Squares of them vanish or overflow: V is 0 or infinite, U is M / ε or 0, and no number is
    lost by that.
    """
    weights = []
    for make in (
        lambda p: AdamW2([("w", p)], **{**OPTIONS, "tau": 100.0}),
        lambda p: torch.optim.AdamW([p], **ADAMW),
    ):
        torch.manual_seed(0)
        weight = parameter(40, 33)
        optimizer = make(weight)
        for _ in range(4):
            weight.grad = torch.randn(40, 33) * gradients
            optimizer.step()
        weights.append(weight.detach())
    assert weights[0].isfinite().all()
    # Roundings of four steps.
    assert torch.allclose(*weights, rtol=4 * ROUNDING, atol=4 * ROUNDING)
    say(
        f"gradients of {gradients:g}, 4 steps, tau 100",
        "the weights are torch.optim.AdamW's to rounding",
    )


ADAMW = {key: value for key, value in OPTIONS.items() if key != "tau"}


@pytest.mark.parametrize("columns", [7, 33], ids=str)
def test_an_update_whose_second_moments_are_infinite_is_measured_as_the_0_that_it_is(
    columns: int, say: Say
) -> None:
    weight = parameter(9, columns)
    optimizer = AdamW2([("w", weight)], **OPTIONS)
    weight.grad = torch.full((9, columns), 3e38)
    optimizer.step()
    assert optimizer.stats()["w"].sigma_update == 0.0
    say(f"gradients of 3e38 in rows of {columns}", "σ₁(U) is 0")


@pytest.mark.parametrize("first", [1e-42, 1e-30, 1e-20, 0.0], ids=str)
@pytest.mark.parametrize("steps", [1, 3], ids=lambda steps: f"after {steps}")
def test_gradients_that_grow_by_thirty_decimals_at_once_are_bounded(
    first: float, steps: int, say: Say
) -> None:
    """Vectors are scaled by 1/σ₁ where it is tiny, and the next product with them overflows: ‖U‖_F
    stands in then.
    """
    torch.manual_seed(0)
    named = [("w", parameter(12, 9)), ("row", parameter(1, 5))]
    optimizer = AdamW2(named, **OPTIONS)
    for step in range(steps + 4):
        before = {name: exact_sigma(p.detach()) for name, p in named}
        for _, p in named:
            p.grad = torch.randn(p.shape) * (first if step < steps else 1.0)
        optimizer.step()
        for name, p in named:
            assert p.isfinite().all(), step
            change = exact_sigma(p.detach()) / before[name]
            assert change <= 1 + OPTIONS["tau"] * 1.01, "the step changes σ₁ by more than τ"
    assert all(entry.clipped for entry in optimizer.stats().values()), (
        "nothing was clipped: the case shows nothing"
    )
    say(
        f"gradients of {first:g} for {steps} steps, then of 1",
        "weights stay finite, no step changes σ₁ by more than τ",
    )


@pytest.mark.parametrize("kind", ["weights", "gradients", "both"])
def test_matrices_whose_singular_values_are_all_equal_follow_the_reference(
    kind: str, say: Say
) -> None:
    torch.manual_seed(0)
    named = [("square", parameter(12, 12)), ("tall", parameter(9, 4))]
    if kind != "gradients":
        for _, p in named:
            nn.init.orthogonal_(p)
    optimizer = AdamW2(named, **OPTIONS)
    judge = Judge(named)
    signs = {
        name: torch.eye(*p.shape) for name, p in named
    }  # |M| / √V is 1 where it is not 0: U is orthogonal, too
    for _ in range(6):
        # A step parts singular values by τ at most, and an iteration does not tell those that close
        # apart at once.
        judge.step(
            optimizer, signs if kind != "weights" else noise(named, 0.0), sigma=OPTIONS["tau"]
        )
    say(
        f"{kind} whose singular values are all equal, 6 steps",
        f"every rate is the exact one to {judge.worst:.0e}",
    )


def test_updates_of_rank_one_follow_the_reference(say: Say) -> None:
    """Another one every step, and no averaging, so that U is sign(G), of rank 1, at each."""
    torch.manual_seed(0)
    named = [("w", parameter(12, 4)), ("wide", parameter(30, 40))]
    options = {"betas": (0.0, 0.0)}
    optimizer, judge = AdamW2(named, **{**OPTIONS, **options}), Judge(named, **options)
    for _ in range(10):
        grads = {
            name: torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1])) for name, p in named
        }
        judge.step(optimizer, dict(grads))
    assert all(entry.clipped for entry in optimizer.stats().values())
    say(
        "updates of rank 1, another one at each of 10 steps",
        f"every rate is the exact one to {judge.worst:.0e}",
    )


def test_parameters_without_gradient_at_some_steps_or_ever_follow_the_reference(say: Say) -> None:
    torch.manual_seed(0)
    named = [
        (name, parameter(8, 4))
        for name in ("always", "odd steps", "from step 3", "until step 3", "never")
    ]
    optimizer, judge = AdamW2(named, **OPTIONS), Judge(named)
    never = named[-1][1].detach().clone()
    for step in range(8):
        grads = noise(named)
        absent = {
            "odd steps": step % 2 == 0,
            "from step 3": step < 3,
            "until step 3": step >= 3,
            "never": True,
        }
        judge.step(
            optimizer, {name: None if absent.get(name) else grad for name, grad in grads.items()}
        )
    counts = {name: int(optimizer.state[p]["step"]) for name, p in named if p in optimizer.state}
    assert counts == {"always": 8, "odd steps": 4, "from step 3": 5, "until step 3": 3}
    assert torch.equal(named[-1][1], never)
    say(
        "matrices without gradient at odd steps, until, from step 3 on, and at all 8",
        f"each is stepped when it has one; rates are exact to {judge.worst:.0e}",
    )


def test_steps_without_any_gradient_change_nothing(say: Say) -> None:
    torch.manual_seed(0)
    named = [("w", parameter(8, 4)), ("b", parameter(5))]
    optimizer, judge = AdamW2(named, **OPTIONS), Judge(named)
    nothing: dict[str, Tensor | None] = {"w": None, "b": None}
    judge.step(optimizer, nothing)
    judge.step(optimizer, noise(named))
    kept = [p.detach().clone() for _, p in named]
    judge.step(optimizer, nothing)
    assert all(torch.equal(p, before) for (_, p), before in zip(named, kept, strict=True))
    judge.step(optimizer, noise(named))
    for _, p in named:
        p.requires_grad_(False).grad = None
    optimizer.step()
    say(
        "a first, a third step and one after freezing everything, without any gradient",
        "nothing moves, and the steps between follow the reference",
    )


def test_parameters_frozen_unfrozen_and_added_later_follow_the_reference(say: Say) -> None:
    torch.manual_seed(0)
    named = [
        (name, parameter(8, 4)) for name in ("plain", "frozen at first", "frozen later", "added")
    ]
    one, first, later, added = (p for _, p in named)
    first.requires_grad_(False)
    optimizer, judge = AdamW2(named[:3], **OPTIONS), Judge(named)
    for step in range(9):
        if step == 3:
            first.requires_grad_(True)
        if step == 4:
            later.requires_grad_(False)
        if step == 5:
            optimizer.add_param_group({"params": [("added", added)]})
        if step == 7:
            later.requires_grad_(True)
        grads = noise(named)
        is_there = {"added": step >= 5}
        judge.step(
            optimizer,
            {n: grads[n] if p.requires_grad and is_there.get(n, True) else None for n, p in named},
        )
        assert set(optimizer.stats()) == {
            n for n, p in named if p.requires_grad and is_there.get(n, True)
        }
    counts = [int(optimizer.state[p]["step"]) for p in (one, first, later, added)]
    assert counts == [9, 6, 6, 4]
    say(
        "9 steps: frozen until step 3, frozen at steps 4 to 6, added by add_param_group at step 5",
        f"each has its own step count, rates are exact to {judge.worst:.0e}",
    )


@pytest.mark.parametrize("kernel", ["torch"], indirect=True)
def test_bf16_parameters_without_masters_follow_the_reference(say: Say) -> None:
    """What is stored has 8 bits: weights, moments and gradients; σ₁ and rates are computed in
    float32 and float64.
    """
    torch.manual_seed(0)
    eps = torch.finfo(torch.bfloat16).eps
    named = [
        ("w", parameter(24, 4, dtype=torch.bfloat16)),
        ("b", parameter(9, dtype=torch.bfloat16)),
    ]
    optimizer, judge = AdamW2(named, **OPTIONS), Judge(named)
    for _ in range(8):
        # M, V and U are rounded at each operation, here and there in another order: a few times 2⁻⁸
        # of a rate.
        judge.step(optimizer, noise(named), rounding=4 * eps)
    assert optimizer.stats()["w"].clipped
    weights = []
    for make in (
        lambda p: AdamW2([("w", p)], **{**OPTIONS, "tau": float("inf")}),
        lambda p: torch.optim.AdamW([p], **ADAMW),
    ):
        torch.manual_seed(0)
        weight = parameter(24, 4, dtype=torch.bfloat16)
        other = make(weight)
        for _ in range(4):
            weight.grad = torch.randn(24, 4).to(torch.bfloat16)
            other.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)
    say(
        "bf16 weights, gradients and moments without masters, 8 steps",
        f"rates are exact to {judge.worst:.0e}; with tau infinite it is torch's AdamW bit for bit",
    )


@pytest.mark.parametrize("kernel", ["torch"], indirect=True)
def test_parameters_of_several_dtypes_are_stepped_side_by_side(say: Say) -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    named = [(str(dtype), parameter(9, 4, dtype=dtype)) for dtype in dtypes]
    optimizer, judge = AdamW2(named, **OPTIONS), Judge(named)
    for _ in range(4):
        judge.step(optimizer, noise(named), rounding=4 * torch.finfo(torch.bfloat16).eps)
    say(
        "one optimizer of float32, float64 and bf16 matrices, 4 steps",
        f"every rate is the exact one to {judge.worst:.0e}, of bf16's rounding",
    )


@pytest.mark.parametrize("kind", ["complex", "sparse", "integer"])
def test_what_is_no_dense_real_gradient_is_refused_before_anything_moves(
    kind: str, say: Say
) -> None:
    torch.manual_seed(0)
    good = parameter(4, 4)
    bad = parameter(4, 4)
    if kind == "complex":
        bad = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    if kind == "integer":
        bad = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    good.grad = torch.ones(4, 4)
    bad.grad = torch.ones(4, 4).to_sparse() if kind == "sparse" else torch.ones_like(bad)
    before = good.detach().clone()
    message = (
        "sparse gradient, it takes dense" if kind == "sparse" else f"parameter 'bad' is {bad.dtype}"
    )
    with pytest.raises(ValueError, match=message) as refused:
        AdamW2([("good", good), ("bad", bad)]).step()
    assert torch.equal(good, before)
    say(
        f"a {kind} parameter or gradient beside a good one",
        str(refused.value),
    )


CASES = {
    "few": "two elements on three ranks: ranks without any",
    "empty": "a parameter of size zero among others",
    "sometimes": "a branch without gradient at every other step, on all ranks",
    "one rank": "a branch without gradient on one rank, at every other step",
    "never": "a parameter that no step uses",
}

#: What DeepSpeed itself cannot do, see odd_worker.py.
EXCEPT = {("empty", 3), *(("one rank", stage) for stage in (1, 2, 3))}


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, Any]]:
    """Every case in one launch, see odd_worker.py: how far each rank found its weights from the
    reference's.
    """
    pytest.importorskip("deepspeed")
    output = run_ranks("deepspeed", Path(__file__).with_name("odd_worker.py"), 3)
    found = re.search(r"^odd (.*)$", output, re.M)
    assert found is not None, output[-3000:]
    return json.loads(found[1])


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)
@pytest.mark.parametrize(
    ("case", "stage"),
    [(case, stage) for case in CASES for stage in range(4) if (case, stage) not in EXCEPT],
)
def test_under_deepspeed_on_three_ranks_it_follows_the_reference(
    on_ranks: list[dict[str, Any]], case: str, stage: int, say: Say
) -> None:
    found = [of_rank[f"{case} {stage}"] for of_rank in on_ranks]
    assert not any(isinstance(each, str) for each in found), found
    assert max(found) < 1e-5  # float32 sums in another order, in six steps
    say(
        f"ZeRO-{stage}, 3 ranks: {CASES[case]}",
        f"weights follow the reference to {max(found):.0e}",
    )


def test_where_tau_is_infinite_no_zero_keeps_a_matrix_from_moving(say: Say) -> None:
    """Beside other thresholds, so that the step is not torch's; ∞ · 0 is not a number."""
    torch.manual_seed(0)
    free, bound = nn.Parameter(torch.zeros(6, 4)), parameter(6, 4)
    groups = [{"params": [("free", free)], "tau": float("inf")}, {"params": [("bound", bound)]}]
    optimizer = AdamW2(groups, lr=0.05, tau=0.01, weight_decay=0.0, floor_std=0.0)
    free.grad, bound.grad = torch.ones(6, 4), torch.ones(6, 4)
    optimizer.step()
    assert torch.allclose(free, torch.full((6, 4), -0.05))
    assert optimizer.stats()["free"].lr == 0.05 and optimizer.stats()["bound"].clipped
    say("a zero matrix without a floor whose tau is infinite", "it moves at the scheduled rate")


def test_an_update_that_is_orthogonal_to_all_vectors_is_bounded(say: Say) -> None:
    """Products with it are exactly 0, as if it were; ‖U‖_F is not."""
    weight = nn.Parameter(torch.ones(1, 8))
    options = {"lr": 0.5, "betas": (0.0, 0.5)}
    optimizer, judge = (
        AdamW2([("w", weight)], **{**OPTIONS, **options}),
        Judge([("w", weight)], **options),
    )
    for step in range(8):
        judge.step(optimizer, {"w": torch.eye(8)[step : step + 1]})
        assert optimizer.stats()["w"].clipped
    say(
        "one element of a 1×8 matrix moves at each step, another one",
        f"every rate is exact to {judge.worst:.0e}",
    )


@pytest.mark.xfail(
    reason="all vectors are 0 in columns that had no gradient, and products never lead there",
    strict=True,
)
def test_a_block_of_a_block_diagonal_update_that_wakes_up_is_bounded(say: Say) -> None:
    """Rows and columns that share nothing with those before: U is block diagonal, and the new
    block's σ₁ is larger.
    """
    torch.manual_seed(0)
    named = [("w", parameter(12, 12))]
    optimizer, judge = AdamW2(named, **{**OPTIONS, "lr": 1.0}), Judge(named, lr=1.0)
    for step in range(10):
        grad = torch.zeros(12, 12)
        grad[:6, :6] = torch.randn(6, 6)
        if step >= 5:
            grad[6:, 6:] = 1.0
        judge.step(optimizer, {"w": grad}, sigma=0.1)  # of a step whose update is another
    say(
        "a block of a block-diagonal gradient that is 0 for 5 steps",
        f"every rate is exact to {judge.worst:.0e}",
    )
