"""The certificate (spectral/certificate.py), the plan of iterations (spectral/iterations.py,
matrices.py) and Rule 1 (rule.py) on the device: the same arithmetic, so that no host waits for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...rule import SLOW_TAU
from ...spectral import certificate
from ...spectral.power import COLD_ITERS
from .numbers import (
    AGE,
    BOUND,
    CAN_UNDO,
    CLIPS,
    DECAY,
    EXPECTED,
    FAILED,
    FLOOR,
    FRESH,
    KEPT,
    LEAST,
    LOWER,
    LR,
    MAKING,
    MOST,
    NORM,
    OF_UPDATE,
    PRESENT,
    PROJECTS,
    RATE,
    SHARE,
    SIGMA,
    SQUARES,
    STOOD_U,
    STOOD_W,
    SURE,
    TAU,
    WAITS,
)

_SLACK = tl.constexpr(1 + certificate.SLACK)
_LESS = tl.constexpr(1 - certificate.SLACK)
_GROWTH = tl.constexpr(certificate._GROWTH)
_LEAST_RATE = tl.constexpr(certificate._LEAST_RATE)
_LEAST_LIMIT = tl.constexpr(certificate._LEAST_LIMIT)
_SAME = tl.constexpr(certificate._SAME)
_COLD = tl.constexpr(COLD_ITERS)
_LARGEST = tl.constexpr(1.7976931348623157e308)
_SLOW = tl.constexpr(SLOW_TAU)


@triton.jit
def _limit(numbers, matrices, inside):
    """τ · max(b, floor), the bound of α σ₁(U)."""
    lower = tl.load(numbers + matrices * LOWER, mask=inside, other=0.0)
    floor = tl.load(numbers + matrices * FLOOR, mask=inside, other=0.0)
    return tl.load(numbers + matrices * TAU, mask=inside, other=0.0) * tl.maximum(lower, floor)


@triton.jit(do_not_specialize=["matrices"])
def expect(numbers, masks, matrices, LANES: tl.constexpr):
    """Which matrices will most likely be settled (Certificate.forecast), or are sure to be."""
    matrix = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = matrix < matrices
    numbers += matrix
    masks += matrix
    lr = tl.load(numbers + matrices * LR, mask=inside, other=0.0)
    limit = _limit(numbers, matrices, inside)
    decay = lr * tl.load(numbers + matrices * DECAY, mask=inside, other=0.0)
    norm = tl.load(numbers + matrices * NORM, mask=inside, other=0.0)
    can_undo = tl.load(numbers + matrices * CAN_UNDO, mask=inside, other=0.0) != 0
    can_undo = can_undo & (decay < 0.5) & (limit > lr * _LEAST_LIMIT)
    expected = (lr * norm * _GROWTH <= limit) & can_undo & (lr > _LEAST_RATE)
    expected = expected | (tl.load(numbers + matrices * SURE, mask=inside, other=0.0) != 0)
    tl.store(masks + matrices * EXPECTED, expected.to(tl.uint8), mask=inside)
    tl.store(masks + matrices * FRESH, (expected == 0).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["matrices"])
def add_norms(spans, numbers, masks, sums, norms, matrices, LANES: tl.constexpr):
    """Of one matrix that was stepped early, over this rank's pieces: Σ u², and whether Σ w² before
    the step shows other weights than the last step left (Certificate.are_others).
    """
    matrix = tl.program_id(0)
    lane = tl.arange(0, LANES)
    squares = tl.zeros((LANES,), dtype=tl.float64)
    before = tl.zeros((LANES,), dtype=tl.float64)
    start, stop = tl.load(spans + matrix * 2), tl.load(spans + matrix * 2 + 1)
    is_expected = tl.load(masks + matrices * EXPECTED + matrix) != 0
    is_present = tl.load(numbers + matrices * PRESENT + matrix) != 0
    if is_expected & is_present:
        for begin in range(start, stop, LANES):
            inside = begin + lane < stop
            at = sums + (begin + lane) * 3
            squares += tl.load(at, mask=inside, other=0.0).to(tl.float64)
            before += tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(before, axis=0)
    known = tl.load(numbers + matrices * SQUARES + matrix)
    is_same = (tl.abs(total - known) <= known * _SAME) | (known != known)
    is_changed = is_expected & is_present & (is_same == 0)
    tl.store(norms + matrix * 2, tl.sum(squares, axis=0))
    tl.store(norms + matrix * 2 + 1, tl.where(is_changed, 1.0, 0.0))


@triton.jit(do_not_specialize=["matrices", "iterations", "half"])
def settle(
    numbers,
    masks,
    norms,
    matrices,
    iterations,
    half,
    COLD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Which matrices are settled (Certificate.settles), and which iterations the others make
    (MatrixGroup's).

    ``half`` of ``iterations`` are made whatever they gain.
    """
    matrix = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = matrix < matrices
    squares = tl.load(norms + matrix * 2, mask=inside, other=0.0)
    is_same = tl.load(norms + matrix * 2 + 1, mask=inside, other=0.0) == 0
    numbers += matrix
    masks += matrix
    lr = tl.load(numbers + matrices * LR, mask=inside, other=0.0)
    tau = tl.load(numbers + matrices * TAU, mask=inside, other=0.0)
    limit = _limit(numbers, matrices, inside)
    expected = tl.load(masks + matrices * EXPECTED, mask=inside, other=0) != 0
    proof = (lr * tl.sqrt(squares) * _SLACK <= limit) & is_same
    is_sure = tl.load(numbers + matrices * SURE, mask=inside, other=0.0) != 0
    settled = expected & (proof | is_sure | (tau == float("inf")))
    waits = settled == 0
    age = tl.load(numbers + matrices * AGE, mask=inside, other=0.0)
    if COLD:
        of_update = tl.maximum(iterations, _COLD) + 0.0 * age
        of_weight, sure, sure_of_weight = of_update, of_update, of_update
    else:
        is_slow = tau <= _SLOW
        of_update = tl.minimum(iterations + age, tl.maximum(iterations, _COLD))
        sure = of_update - half
        of_weight = tl.where(is_slow, tl.floor((of_update + 1.0) / 2.0), of_update)
        sure_of_weight = tl.where(is_slow, tl.floor((sure + 1.0) / 2.0), of_update)
        # What σ₁ gains says nothing of the other singular values.
        projects = tl.load(numbers + matrices * PROJECTS, mask=inside, other=0.0) != 0
        sure = tl.where(projects, of_update, sure)
    tl.store(masks + matrices * FAILED, (expected & waits).to(tl.uint8), mask=inside)
    tl.store(masks + matrices * WAITS, waits.to(tl.uint8), mask=inside)
    is_iterated = waits & (of_update > 0)
    tl.store(masks + matrices * MAKING, is_iterated.to(tl.uint8), mask=inside)
    tl.store(masks + matrices * MAKING + matrices, is_iterated.to(tl.uint8), mask=inside)
    tl.store(numbers + matrices * MOST, of_weight, mask=inside)
    tl.store(numbers + matrices * MOST + matrices, of_update, mask=inside)
    tl.store(numbers + matrices * LEAST, sure_of_weight, mask=inside)
    tl.store(numbers + matrices * LEAST + matrices, sure, mask=inside)
    tl.store(numbers + matrices * OF_UPDATE, squares, mask=inside)


@triton.jit(do_not_specialize=["matrices"])
def decide_rates(numbers, masks, matrices, LANES: tl.constexpr):
    """α_W of every matrix (rule.clipped_rates), and which are projected; ‖U‖_F stands for a σ₁(U)
    that no iteration saw.
    """
    matrix = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = matrix < matrices
    numbers += matrix
    masks += matrix
    lr = tl.load(numbers + matrices * LR, mask=inside, other=0.0)
    tau = tl.load(numbers + matrices * TAU, mask=inside, other=0.0)
    floor = tl.load(numbers + matrices * FLOOR, mask=inside, other=0.0)
    sigma_weight = tl.load(numbers + matrices * SIGMA, mask=inside, other=0.0)
    sigma_update = tl.load(numbers + matrices * SIGMA + matrices, mask=inside, other=0.0)
    norm = tl.sqrt(tl.load(numbers + matrices * OF_UPDATE, mask=inside, other=0.0))
    sigma_update = tl.where(sigma_update > 0, sigma_update, norm)
    # A σ₁(W) that is not a number counts for the floor.
    weight = tl.where(sigma_weight > floor, sigma_weight, floor)
    is_free = (sigma_update == 0) | (tau == float("inf"))
    bound = tl.where(
        is_free, float("inf"), tau * weight / tl.where(sigma_update == 0, 1.0, sigma_update)
    )
    rate = tl.where((bound < lr) | (bound != bound), bound, lr)
    tl.store(numbers + matrices * RATE, rate, mask=inside)
    tl.store(numbers + matrices * BOUND, tau * weight, mask=inside)
    waits = tl.load(masks + matrices * WAITS, mask=inside, other=0) != 0
    projects = tl.load(numbers + matrices * PROJECTS, mask=inside, other=0.0) != 0
    clips = waits & projects & (rate < lr)
    tl.store(masks + matrices * CLIPS, clips.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["matrices"])
def follow(
    spans,
    of_moves,
    numbers,
    masks,
    norms,
    sums,
    squares,
    matrices,
    LANES: tl.constexpr,
):
    """The certificate of one matrix after the step (Certificate.measured and moved), and what
    statistics say of it. Σ w² after it is in ``sums``, or in ``squares`` where it was projected.
    """
    matrix = tl.program_id(0)
    lane = tl.arange(0, LANES)
    after = tl.zeros((LANES,), dtype=tl.float64)
    is_changed = tl.load(norms + matrix * 2 + 1) != 0
    numbers += matrix
    is_present = tl.load(numbers + matrices * PRESENT) != 0
    settled = tl.load(masks + matrices * WAITS + matrix) == 0
    clips = (settled == 0) & (tl.load(masks + matrices * CLIPS + matrix) != 0)
    if clips:
        spans, sums, apart = of_moves, squares, 1
    else:
        sums, apart = sums + 2, 3
    start, stop = tl.load(spans + matrix * 2), tl.load(spans + matrix * 2 + 1)
    if is_present:
        for begin in range(start, stop, LANES):
            inside = begin + lane < stop
            after += tl.load(sums + (begin + lane) * apart, mask=inside, other=0.0).to(tl.float64)
    # Of settled ones no rate was decided.
    lr = tl.load(numbers + matrices * LR)
    rate = tl.where(settled, lr, tl.load(numbers + matrices * RATE))
    of_decay = tl.where(clips, lr, rate)  # rule.decay_rates
    rate = tl.where(clips, lr * tl.load(numbers + matrices * SHARE), rate)
    tl.store(numbers + matrices * RATE, rate)
    norm = tl.sqrt(tl.load(numbers + matrices * OF_UPDATE))
    sigma_weight = tl.load(numbers + matrices * SIGMA)
    sigma_update = tl.load(numbers + matrices * SIGMA + matrices)
    lower = tl.load(numbers + matrices * LOWER)
    tl.store(numbers + matrices * STOOD_W, tl.where(settled, lower, sigma_weight))
    stands = settled | ((sigma_update > 0) == 0)
    tl.store(numbers + matrices * STOOD_U, tl.where(stands, norm, sigma_update))
    measured = tl.where(sigma_weight == sigma_weight, sigma_weight, 0.0)
    measured = tl.minimum(measured, _LARGEST) * _LESS
    lower = tl.where(settled, lower, measured)
    age = tl.load(numbers + matrices * AGE)
    tl.store(numbers + matrices * AGE, tl.where(settled, age + 1.0, 0.0))
    decay = of_decay * tl.load(numbers + matrices * DECAY)
    lower = (1.0 - decay) * lower - rate * norm * _SLACK
    lower = lower * tl.load(numbers + matrices * KEPT)
    lower = tl.where(lower > 0, lower, 0.0)  # neither NaN nor less than 0
    # Of other weights nothing is known until they are measured.
    lower = tl.where(is_changed & settled, 0.0, lower)
    tl.store(numbers + matrices * LOWER, lower)
    tl.store(numbers + matrices * NORM, norm)
    if is_present:
        tl.store(numbers + matrices * SQUARES, tl.sum(after, axis=0))
