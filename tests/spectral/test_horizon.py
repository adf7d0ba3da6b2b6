"""What a host relies on without waiting: never less than an adversary's gradients can do."""

from __future__ import annotations

from math import inf, nan, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weyl_megatron.spectral.certificate import SLACK
from weyl_megatron.spectral.horizon import Horizon, Steps

#: What sums in float64 may be off by.
ROUNDING = 1e-9

EPS = 1e-8


class Matrix:
    """A matrix in AdamW's arithmetic, in float64, at step ``count``."""

    def __init__(self, weight: Tensor, m: Tensor, v: Tensor, count: int) -> None:
        self.weight, self.m, self.v, self.count = weight, m, v, count
        self.norm = nan

    def step(self, grad: Tensor, step: Steps, share: float = 1.0) -> None:
        """Step at a ``share`` of the rate, as a clip would have it."""
        lr, decay, beta1, beta2 = (float(column[0]) for column in step)
        self.count += 1
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad**2
        root = (self.v / (1 - beta2**self.count)).sqrt() + EPS
        update = self.m / (1 - beta1**self.count) / root
        self.norm = float(torch.linalg.matrix_norm(update))
        self.weight = self.weight - share * lr * (decay * self.weight + update)

    def sigma(self) -> float:
        return float(torch.linalg.matrix_norm(self.weight, 2))


def steps_of(lr: float, decay: float, beta1: float, beta2: float, count: int = 1) -> Steps:
    return Steps(*(torch.full((count,), x, dtype=torch.float64) for x in (lr, decay, beta1, beta2)))


def started(matrix: Matrix, step: Steps, told: int, slack: float = 1.0) -> Horizon:
    """Return a horizon that was told of a matrix ``told`` times, last of its bounds as they are
    now.
    """
    size = torch.tensor([float(matrix.weight.numel())], dtype=torch.float64)
    horizon = Horizon(size, torch.ones(1, dtype=torch.float64))
    lower = torch.tensor([matrix.sigma() * slack], dtype=torch.float64)
    for _ in range(told):
        horizon.read(lower, torch.tensor([matrix.norm], dtype=torch.float64), step)
    return horizon


def bounds(horizon: Horizon, step: Steps) -> tuple[float, float]:
    """Return what a horizon takes ‖U‖_F of the step to come for at most, and σ₁(W) for at least."""
    return float(horizon._next_squares(step)[0].sqrt()), float(horizon._lower[0])


def worst(matrix: Matrix, beta1: float, beta2: float) -> Tensor:
    """Return the gradient that makes each |u'| largest, but for ε: g ∝ β₂ v (1 − β₁) / ((1 − β₂)
    β₁ m), where d|u'|/dg is 0.
    """
    m = torch.where(matrix.m == 0, 1e-30, matrix.m)
    grad = beta2 * matrix.v * (1 - beta1) / ((1 - beta2) * beta1 * m) if beta1 else matrix.m * 0 + 1
    return grad.clamp(-1e12, 1e12)


#: Below, β₁ m of the worst gradient would vanish.
betas = st.tuples(st.one_of(st.just(0.0), st.floats(1e-3, 0.99)), st.floats(0.5, 0.9999))
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
sizes = st.sampled_from([1e-12, 1e-3, 1.0, 1e4])


@given(betas, shapes, st.integers(0, 3), st.integers(0, 2000), sizes, st.data())
def test_no_gradient_makes_an_update_larger_or_a_weight_smaller_than_is_relied_on(
    both: tuple[float, float],
    shape: tuple[int, int],
    missed: int,
    made: int,
    size: float,
    data: st.DataObject,
) -> None:
    """Moments of any history, gradients of any size, or the worst; rates up to the scheduled one.

    Steps of which nothing was told count for less than were made.
    """
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))

    def noise() -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn * torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, size)

    step = steps_of(data.draw(st.sampled_from([1e-6, 1e-3, 0.3])), 0.1, *both)
    matrix = Matrix(noise() + 1e-6, noise(), noise().square(), made)
    matrix.step(noise(), step, share=0.5)
    told = data.draw(st.integers(1, made + 1 - min(missed, made)))
    horizon = started(matrix, step, min(told, 50))
    for _ in range(data.draw(st.integers(1, 3))):
        norm, lower = bounds(horizon, step)
        kind = data.draw(st.sampled_from(["worst", "noise", "huge", "zero"]))
        factor = {"noise": 1.0, "huge": 1e8, "zero": 0.0}.get(kind)
        assert lower <= matrix.sigma() * (1 + ROUNDING)
        grad = worst(matrix, *both) if factor is None else noise() * factor
        matrix.step(grad, step, share=data.draw(st.sampled_from([0.0, 0.1, 1.0])))
        assert matrix.norm <= norm * (1 + ROUNDING)
        horizon.follow(step)
    norm, lower = bounds(horizon, step)
    assert lower <= matrix.sigma() * (1 + ROUNDING)


@pytest.mark.parametrize("both", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.99)], ids=str)
@pytest.mark.parametrize("count", [300, 3000])
def test_a_step_s_bound_is_near_what_the_worst_gradient_does(
    both: tuple[float, float], count: int
) -> None:
    """Or else nothing would ever be sure. Where all elements of U are alike, Cauchy and Schwarz
    is an equality.
    """
    step = steps_of(1e-3, 0.0, *both)
    ones = torch.ones(5, 4, dtype=torch.float64)
    matrix = Matrix(ones.clone(), ones * 0, ones * 0, 0)
    for _ in range(count):
        matrix.step(ones.clone(), step)
    norm, _ = bounds(started(matrix, step, count), step)
    matrix.step(worst(matrix, *both), step)
    # The bound takes 1 − β₂ᵗ for 1, as more steps may have been made than are counted; and SLACK.
    loose = 1 / sqrt(1 - both[1] ** count)
    assert matrix.norm <= norm <= matrix.norm * loose * (1 + 2 * SLACK)
    assert norm < 2 * matrix.norm


def test_weights_that_updates_take_away_from_are_followed_closely() -> None:
    """U against W, of rank 1 as W: each step takes α ‖U‖_F from σ₁(W)."""
    step = steps_of(1e-3, 0.1, 0.9, 0.95)
    ones = torch.ones(6, 6, dtype=torch.float64)
    matrix = Matrix(ones.clone(), ones * 0, ones * 0, 0)
    for _ in range(30):
        matrix.step(ones * 0.5, step)
    horizon = started(matrix, step, 30)
    for _ in range(2):
        horizon.follow(step)
        matrix.step(worst(matrix, 0.9, 0.95), step)
    _, lower = bounds(horizon, step)
    before = 1.0 * 6 * (1 - 32e-3)
    assert lower <= matrix.sigma() and lower > 0.98 * before


def test_what_rounding_takes_away_is_taken_into_account() -> None:
    ones = torch.ones(1, dtype=torch.float64)
    step = steps_of(0.0, 0.0, 0.9, 0.95)
    horizon = Horizon(ones * 4, ones * 0.5)
    horizon.read(ones * 8, ones, step)
    horizon.follow(step)
    step = steps_of(1.0, 0.0, 0.9, 0.95)
    _, lower = bounds(horizon, step)
    assert lower == pytest.approx(4, rel=1e-6)


UNKNOWN = {
    "other betas": (1.0, (0.9, 0.99)),
    "no betas": (1.0, (nan, nan)),
    "no gradient": (0.0, (0.9, 0.95)),
    "no number": (nan, (0.9, 0.95)),
    "infinite": (inf, (0.9, 0.95)),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_of_what_is_not_known_nothing_is_sure(what: str) -> None:
    """Neither now nor in the steps that follow, until a device tells something else."""
    norm, both = UNKNOWN[what]
    ones = torch.ones(2, dtype=torch.float64)
    horizon = Horizon(ones * 4, ones)
    before, step = steps_of(1e-9, 0.0, 0.9, 0.95, 2), steps_of(1e-9, 0.0, *both, 2)
    step = Steps(step.lr, step.weight_decay, *map(_first, step[2:], before[2:]))
    horizon.read(ones, torch.tensor([norm, 1.0], dtype=torch.float64), before)
    for _ in range(2):
        assert horizon.sure(step, ones, ones).tolist() == [False, True]
        horizon.follow(step)
        step = before  # what was once with other betas stays unknown
    horizon.read(ones, ones, before)
    assert horizon.sure(before, ones, ones).all()


def _first(first: Tensor, others: Tensor) -> Tensor:
    return torch.stack([first[0], others[1]])


def test_where_tau_is_infinite_all_is_sure_and_nothing_is_before_a_device_told() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    horizon, step = Horizon(ones * 4, ones), steps_of(1e-9, 0.0, 0.9, 0.95, 2)
    tau = torch.tensor([inf, 1.0], dtype=torch.float64)
    assert horizon.sure(step, tau, ones).tolist() == [True, False]
    horizon.read(ones, ones, step)
    assert horizon.sure(step, tau, ones).all()
    horizon.forget()
    assert horizon.sure(step, tau, ones).tolist() == [True, False]


def test_ranks_that_ask_at_other_times_rely_on_the_same() -> None:
    """What else a rank has decides when it asks; of what it shares it has to hear the same."""
    ones = torch.ones(2, dtype=torch.float64)
    step = steps_of(1e-3, 0.1, 0.9, 0.95, 2)
    asked, silent = Horizon(ones * 12, ones), Horizon(ones * 12, ones)
    for told in range(1, 30):
        asked.read(ones, ones * 0.5, step)
        asked.sure(step, ones, ones)
        if told < 29:
            silent.count(ones * 0.5)
    silent.read(ones, ones * 0.5, step)
    for horizon in (asked, silent):
        horizon.follow(step)
    assert bounds(asked, step) == bounds(silent, step)
