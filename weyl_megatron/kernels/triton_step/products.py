"""The first read of W and U in an iteration: Y = A X, row by row. The second is collect.py's."""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw import MOMENTS, UPDATES, WEIGHTS, address, direction, elements, moments
from .numbers import FRESH, MAKING
from .tables import HYPER_SIZE, UNIT_SIZE


@triton.jit
def _quarters(a, A: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr):
    """The first, second, third and last of every four columns that a thread holds."""
    even, odd = tl.split(tl.reshape(a, (A, B, LANES, 2, 2)))
    first, third = tl.split(even)
    second, last = tl.split(odd)
    return first, second, third, last


@triton.jit
def _bands(
    unit,
    pointers,
    hyper,
    is_fresh,
    x,
    left,
    lines,
    sums,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """A unit's rows, ROWS at a time: columns of Y in registers, summed once a band."""
    COLS: tl.constexpr = 4 * LANES if WIDE else LANES
    aligned: tl.constexpr = 16 if WIDE else 0
    # M, V and gradients of fewer bytes are read as many at a time, not as many bytes.
    widest: tl.constexpr = 4 if (OF_M == tl.float32) | (OF_V == tl.float32) else 2
    of_g: tl.constexpr = aligned * (4 if GRAD == tl.float32 else 2) // widest
    of_m: tl.constexpr = aligned * (4 if OF_M == tl.float32 else 2) // widest
    of_v: tl.constexpr = aligned * (4 if OF_V == tl.float32 else 2) // widest
    buffer, offset, count = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
    cols, stride, n = tl.load(unit + 3), tl.load(unit + 4), tl.load(unit + 9)
    slot, width = tl.load(unit + 12), tl.load(unit + 13)
    x += tl.load(unit + 8)
    lines += tl.load(unit + 11)
    base = address(pointers, buffer, 0, offset, STATE, aligned)
    first = address(pointers, buffer, 2, offset, OF_M, of_m)
    second = address(pointers, buffer, 3, offset, OF_V, of_v)
    grads = address(pointers, buffer, 1, offset, GRAD, of_g)
    of_root, of_one = tl.load(hyper + 3), tl.load(hyper + 4)
    # M and V that were updated before stay as they are.
    of_grad = tl.where(is_fresh, tl.load(hyper), 0.0)
    of_old = tl.where(is_fresh, tl.load(hyper + 1), 1.0)
    of_square = tl.where(is_fresh, tl.load(hyper + 2), 0.0)
    if WIDE:  # which the caller has seen
        cols = cols // 8 * 8
        stride = stride // 4 * 4
        n = n // 4 * 4
        x = tl.multiple_of(x, 16)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    vectors = tl.arange(0, BLOCK)
    of_block = vectors < width
    squares = tl.zeros((ROWS, 1, LANES), dtype=tl.float32)
    for begin in range(0, count, ROWS):
        # Behind the last row it is read again, and counts for nothing.
        is_row = begin + row < count
        rows = tl.minimum(begin + row, count - 1)
        acc = tl.zeros((ROWS, BLOCK, LANES), dtype=tl.float32)
        of_band = tl.zeros((ROWS, 1, LANES), dtype=tl.float32)
        for start in range(0, cols, COLS):
            in_cols = (start + col) < cols
            at = rows[:, None] * stride + (start + col)[None, :]
            inside = in_cols[None, :]
            if SOURCE == MOMENTS:
                grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
                exp_avg = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
                exp_avg_sq = tl.load(second + at, mask=inside, other=1.0).to(tl.float32)
                exp_avg, exp_avg_sq = moments(
                    grad, exp_avg, exp_avg_sq, of_grad, of_old, of_square, OF_M, OF_V
                )
                tl.store(first + at, exp_avg.to(OF_M), mask=is_row[:, None] & inside)
                tl.store(second + at, exp_avg_sq.to(OF_V), mask=is_row[:, None] & inside)
                a = direction(exp_avg, exp_avg_sq, of_root, of_one)
            else:
                a = elements(base, first, second, at, inside, of_root, of_one, SOURCE)
            x_at = vectors[:, None] * n + (start + col)[None, :]
            xs = tl.load(x + x_at, mask=of_block[:, None] & inside, other=0.0)
            if WIDE:
                a0, a1, a2, a3 = _quarters(a, ROWS, 1, LANES)
                x0, x1, x2, x3 = _quarters(xs, 1, BLOCK, LANES)
                acc += a0 * x0
                acc += a1 * x1
                acc += a2 * x2
                acc += a3 * x3
                if SOURCE == MOMENTS:
                    of_band += a0 * a0
                    of_band += a1 * a1
                    of_band += a2 * a2
                    of_band += a3 * a3
            else:
                a3d = tl.reshape(a, (ROWS, 1, LANES))
                acc += a3d * tl.reshape(xs, (1, BLOCK, LANES))
                if SOURCE == MOMENTS:
                    of_band += a3d * a3d
        if SOURCE == MOMENTS:
            squares += tl.where(is_row[:, None, None], of_band, 0.0)
        y = tl.sum(acc, axis=2)  # (ROWS, BLOCK)
        in_y = is_row[:, None] & of_block[None, :]
        y = tl.where(in_y, y, 0.0)
        if slot >= 0:
            at = rows[:, None] * width + vectors[None, :]
            tl.atomic_add(left + slot + at, y, mask=in_y)
        else:
            at = rows[:, None] * BLOCK + vectors[None, :]
            tl.store(lines + at, y, mask=is_row[:, None])
    if SOURCE == MOMENTS:
        tl.store(sums, tl.sum(tl.sum(tl.reshape(squares, (ROWS, LANES)), axis=1), axis=0))


@triton.jit
def _gram(unit, lines, gram, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """YᵀY of a unit's rows."""
    count, width = tl.load(unit + 2), tl.load(unit + 13)
    lines += tl.load(unit + 11)
    line, vectors = tl.arange(0, LANES), tl.arange(0, BLOCK)
    tl.debug_barrier()
    for j in range(0, width):
        acc = tl.zeros((LANES, BLOCK), dtype=tl.float32)
        for begin in range(0, count, LANES):
            at = (begin + line) * BLOCK
            inside = begin + line < count
            y = tl.load(lines + at[:, None] + vectors[None, :], mask=inside[:, None], other=0.0)
            yj = tl.load(lines + at + j, mask=inside, other=0.0)
            acc += y * yj[:, None]
        tl.store(gram + j * BLOCK + vectors, tl.sum(acc, axis=0))


@triton.jit
def _unit(
    unit,
    pointers,
    hyper,
    is_fresh,
    x,
    left,
    lines,
    gram,
    sums,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """A unit, four elements at a time where all that it touches is aligned."""
    buffer = tl.load(unit)
    grad_size: tl.constexpr = 4 if GRAD == tl.float32 else 2
    m_size: tl.constexpr = 4 if OF_M == tl.float32 else 2
    v_size: tl.constexpr = 4 if OF_V == tl.float32 else 2
    state_size: tl.constexpr = 4 if STATE == tl.float32 else 2
    offset, stride = tl.load(unit + 1), tl.load(unit + 4)
    place = offset | stride
    if SOURCE == WEIGHTS:
        odd = tl.load(pointers + buffer * 4) | (place * state_size)
    else:
        odd = tl.load(pointers + buffer * 4 + 2) | (place * m_size)
        odd = odd | tl.load(pointers + buffer * 4 + 3) | (place * v_size)
    if SOURCE == MOMENTS:
        odd = odd | tl.load(pointers + buffer * 4 + 1) | (place * grad_size)
    odd = (odd & 15) | ((tl.load(unit + 8) | tl.load(unit + 9)) & 3) | (tl.load(unit + 3) & 7)
    if odd == 0:
        _bands(
            unit, pointers, hyper, is_fresh, x, left, lines, sums,
            SOURCE, BLOCK, ROWS, LANES, True, STATE, GRAD, OF_M, OF_V,
        )  # fmt: skip
    else:
        _bands(
            unit, pointers, hyper, is_fresh, x, left, lines, sums,
            SOURCE, BLOCK, ROWS, LANES, False, STATE, GRAD, OF_M, OF_V,
        )  # fmt: skip
    if tl.load(unit + 12) < 0:
        _gram(unit, lines, gram, BLOCK, LANES)


@triton.jit(do_not_specialize=["start", "matrices"])
def products(
    units,
    start,
    pointers,
    hypers,
    masks,
    x,
    left,
    lines,
    grams,
    sums,
    matrices,
    FIRST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS_W: tl.constexpr,
    BLOCK_U: tl.constexpr,
    ROWS_U: tl.constexpr,
    LANES: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """Y of a unit's whole rows to ``lines`` and their YᵀY to ``grams``, or Y of cut rows to
    ``left``; FIRST: of W and of U whose moments are updated on the way, with Σ u² to ``sums``.
    """
    unit_number = start + tl.program_id(0)
    unit = units + unit_number * UNIT_SIZE
    buffer, matrix, operand = tl.load(unit), tl.load(unit + 5), tl.load(unit + 7)
    hyper = hypers + buffer * HYPER_SIZE
    masks += matrix
    sums += unit_number * 3
    WIDEST: tl.constexpr = BLOCK_U if BLOCK_U > BLOCK_W else BLOCK_W
    gram = grams + unit_number * (WIDEST * WIDEST)
    is_making = tl.load(masks + matrices * (operand + MAKING)) != 0
    is_there = (operand == 0) | (tl.load(pointers + buffer * 4 + 2) != 0)
    if is_making & (is_there == 0):
        # U is 0 where there is no gradient.
        place = tl.arange(0, WIDEST * WIDEST)
        tl.store(gram + place, tl.zeros((WIDEST * WIDEST,), dtype=tl.float32))
        tl.store(sums, 0.0)
    if is_making & is_there:
        if operand == 0:
            _unit(
                unit, pointers, hyper, False, x, left, lines, gram, sums,
                WEIGHTS, BLOCK_W, ROWS_W, LANES, STATE, STATE, OF_M, OF_V,
            )  # fmt: skip
        else:
            is_fresh = tl.load(masks + matrices * FRESH) != 0
            _unit(
                unit, pointers, hyper, is_fresh, x, left, lines, gram, sums,
                MOMENTS if FIRST else UPDATES, BLOCK_U, ROWS_U, LANES, STATE,
                GRAD if FIRST else STATE, OF_M, OF_V,
            )  # fmt: skip
