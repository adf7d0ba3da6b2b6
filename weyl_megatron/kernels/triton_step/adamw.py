"""AdamW's arithmetic, and its passes over all that is stepped: one read and one write of each."""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import CLIPS, EXPECTED, FAILED, FRESH, RATE, WAITS
from .tables import HYPER_SIZE, UNIT_SIZE

#: What a pass does: everything that is expected to be settled at the scheduled rate, take that
#: back, move the others at their matrix's rate.
STEP = tl.constexpr(0)
UNDO = tl.constexpr(1)
MOVE = tl.constexpr(2)

#: What is read: W, U of M and V, or U of M and V that are updated first.
WEIGHTS = tl.constexpr(0)
UPDATES = tl.constexpr(1)
MOMENTS = tl.constexpr(2)


@triton.jit
def address(pointers, buffer, which, offset, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Where an element of a buffer's W, G, M or V (0 to 3) lies; at a multiple of WIDE bytes."""
    size: tl.constexpr = 4 if DTYPE == tl.float32 else 2
    place = tl.load(pointers + buffer * 4 + which) + offset * size
    if DTYPE == tl.float32:
        pointer = place.to(tl.pointer_type(tl.float32))
    elif DTYPE == tl.bfloat16:
        pointer = place.to(tl.pointer_type(tl.bfloat16))
    else:
        pointer = place.to(tl.pointer_type(tl.float16))
    if WIDE > 0:
        pointer = tl.multiple_of(pointer, WIDE)
    return pointer


@triton.jit
def moments(
    grad,
    exp_avg,
    exp_avg_sq,
    of_grad,
    of_old,
    of_square,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """M and V after a gradient, as they are stored."""
    exp_avg += of_grad * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * of_old + of_square * grad * grad
    return exp_avg.to(OF_M).to(tl.float32), exp_avg_sq.to(OF_V).to(tl.float32)


@triton.jit
def direction(exp_avg, exp_avg_sq, of_root, of_one):
    """U = m / (√v · of_root + of_one), both bias corrections in the constants."""
    return exp_avg / (tl.sqrt(exp_avg_sq) * of_root + of_one)


@triton.jit
def elements(base, first, second, at, inside, of_root, of_one, SOURCE: tl.constexpr):
    """The elements of a block of W or U, 0 outside."""
    if SOURCE == WEIGHTS:
        return tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(second + at, mask=inside, other=1.0).to(tl.float32)
    return direction(exp_avg, exp_avg_sq, of_root, of_one)


@triton.jit
def _pass(
    at,
    inside,
    base,
    grads,
    first,
    second,
    of_grad,
    of_old,
    of_square,
    of_root,
    of_one,
    root,
    eps,
    size,
    decay,
    squares,
    before,
    after,
    MODE: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """One block of a pass; returns Σ u², Σ w² before and after it, added to those of earlier
    blocks.
    """
    weight = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    if MODE == STEP:
        grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
        exp_avg, exp_avg_sq = moments(
            grad, exp_avg, exp_avg_sq, of_grad, of_old, of_square, OF_M, OF_V
        )
        tl.store(first + at, exp_avg.to(OF_M), mask=inside)
        tl.store(second + at, exp_avg_sq.to(OF_V), mask=inside)
        update = tl.where(inside, direction(exp_avg, exp_avg_sq, of_root, of_one), 0.0)
        squares += update * update
        before += weight * weight
    quotient = exp_avg / (tl.sqrt(exp_avg_sq) / root + eps)
    quotient = tl.where(inside, quotient, 0.0)
    if MODE == UNDO:
        weight = (weight + size * quotient) / decay
    else:
        weight = weight * decay - size * quotient
    weight = weight.to(STATE)
    tl.store(base + at, weight, mask=inside)
    after += weight.to(tl.float32) * weight.to(tl.float32)
    return squares, before, after


@triton.jit
def _unit(
    unit,
    pointers,
    hyper,
    rate,
    sums,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """A unit, run by run: eight elements at a time from where all that is read is aligned."""
    buffer = tl.load(unit)
    cols, stride = tl.load(unit + 3), tl.load(unit + 4)
    of_grad, of_old, of_square = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    of_root, of_one = tl.load(hyper + 3), tl.load(hyper + 4)
    root, eps = tl.load(hyper + 8), tl.load(hyper + 9)
    decay = (1.0 - rate * tl.load(hyper + 6)).to(tl.float32)
    size = (rate / tl.load(hyper + 7)).to(tl.float32)  # α / (1 - β₁ᵗ)
    squares = tl.zeros((WIDE,), dtype=tl.float32)
    before = tl.zeros((WIDE,), dtype=tl.float32)
    after = tl.zeros((WIDE,), dtype=tl.float32)
    edge_squares = tl.zeros((NARROW,), dtype=tl.float32)
    edge_before = tl.zeros((NARROW,), dtype=tl.float32)
    edge_after = tl.zeros((NARROW,), dtype=tl.float32)
    wide, narrow = tl.arange(0, WIDE), tl.arange(0, NARROW)
    state_size: tl.constexpr = 4 if STATE == tl.float32 else 2
    grad_size: tl.constexpr = 4 if GRAD == tl.float32 else 2
    m_size: tl.constexpr = 4 if OF_M == tl.float32 else 2
    v_size: tl.constexpr = 4 if OF_V == tl.float32 else 2
    widest: tl.constexpr = max(state_size, m_size, v_size)
    # What has fewer bytes is read as many elements at a time, not as many bytes.
    of_w: tl.constexpr = 16 * state_size // widest
    of_g: tl.constexpr = 16 * grad_size // widest
    of_m: tl.constexpr = 16 * m_size // widest
    of_v: tl.constexpr = 16 * v_size // widest
    for row in range(0, tl.load(unit + 2)):
        begin = tl.load(unit + 1) + row * stride
        phase = (tl.load(pointers + buffer * 4) // state_size + begin) & 7
        is_odd = phase != ((tl.load(pointers + buffer * 4 + 2) // m_size + begin) & 7)
        is_odd |= phase != ((tl.load(pointers + buffer * 4 + 3) // v_size + begin) & 7)
        if MODE == STEP:
            is_odd |= phase != ((tl.load(pointers + buffer * 4 + 1) // grad_size + begin) & 7)
        head = tl.minimum(tl.where(is_odd, cols, (8 - phase) & 7), cols)
        body = (cols - head) // 8 * 8
        edges = cols - body
        base = address(pointers, buffer, 0, begin, STATE, 0)
        first = address(pointers, buffer, 2, begin, OF_M, 0)
        second = address(pointers, buffer, 3, begin, OF_V, 0)
        grads = address(pointers, buffer, 1, begin, GRAD, 0)
        for start in range(0, edges, NARROW):
            at = start + narrow
            inside = at < edges
            at = tl.where(at < head, at, at + body)
            edge_squares, edge_before, edge_after = _pass(
                at, inside, base, grads, first, second,
                of_grad, of_old, of_square, of_root, of_one, root, eps, size, decay,
                edge_squares, edge_before, edge_after, MODE, STATE, OF_M, OF_V,
            )  # fmt: skip
        base = address(pointers, buffer, 0, begin + head, STATE, of_w)
        first = address(pointers, buffer, 2, begin + head, OF_M, of_m)
        second = address(pointers, buffer, 3, begin + head, OF_V, of_v)
        grads = address(pointers, buffer, 1, begin + head, GRAD, of_g)
        for start in range(0, body, WIDE):
            at = start + wide
            squares, before, after = _pass(
                at, at < body, base, grads, first, second,
                of_grad, of_old, of_square, of_root, of_one, root, eps, size, decay,
                squares, before, after, MODE, STATE, OF_M, OF_V,
            )  # fmt: skip
    if tl.load(unit + 6) != 0:
        if MODE == STEP:
            tl.store(sums, tl.sum(squares, axis=0) + tl.sum(edge_squares, axis=0))
            tl.store(sums + 1, tl.sum(before, axis=0) + tl.sum(edge_before, axis=0))
        tl.store(sums + 2, tl.sum(after, axis=0) + tl.sum(edge_after, axis=0))


@triton.jit(do_not_specialize=["start", "matrices"])
def elementwise(
    units,
    start,
    pointers,
    hypers,
    masks,
    numbers,
    sums,
    matrices,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """One pass of AdamW's arithmetic over a unit (STEP, UNDO or MOVE); Σ u², Σ w² before and after
    to ``sums``.
    """
    unit_number = start + tl.program_id(0)
    unit = units + unit_number * UNIT_SIZE
    sums += unit_number * 3
    buffer, matrix = tl.load(unit), tl.load(unit + 5)
    hyper = hypers + buffer * HYPER_SIZE
    is_matrix = matrix >= 0
    masks += matrix
    row = EXPECTED if MODE == STEP else (FAILED if MODE == UNDO else WAITS)
    is_active = tl.load(masks + matrices * row, mask=is_matrix, other=1 if MODE == STEP else 0) != 0
    if MODE == MOVE:  # what is projected is moved by project()
        is_active = is_active & (tl.load(masks + matrices * CLIPS, mask=is_matrix, other=0) == 0)
    is_there = tl.load(pointers + buffer * 4 + 2) != 0
    if MODE == STEP:
        if is_there == 0:  # nothing is summed of what has no gradient
            tl.store(sums + tl.arange(0, 4), 0.0, mask=tl.arange(0, 4) < 3)
    if is_active & is_there:
        rate = tl.load(hyper + 5).to(tl.float64)
        if MODE == MOVE:
            rate = tl.load(numbers + matrices * RATE + matrix)
            # A piece that another rank measures was left alone so far.
            is_new = (tl.load(masks + matrices * FRESH) != 0) & (tl.load(unit + 6) == 0)
            if is_new:
                _unit(
                    unit, pointers, hyper, rate, sums, STEP, WIDE, NARROW, STATE, GRAD, OF_M, OF_V
                )
            else:
                _unit(
                    unit, pointers, hyper, rate, sums, MOVE, WIDE, NARROW, STATE, GRAD, OF_M, OF_V
                )
        else:
            _unit(unit, pointers, hyper, rate, sums, MODE, WIDE, NARROW, STATE, GRAD, OF_M, OF_V)
