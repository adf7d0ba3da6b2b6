"""The step's kernels in Triton. A table has one row of ``spectral.blocks.COLUMNS`` per tile; a unit
is a band of rows.

Each program works on one unit and writes what it sums to a place of its own; a second kernel adds
the places of a matrix up in their order. Without atomics a step gives the same bits every time, and
copies on several ranks stay equal. (The only atomics add two numbers to a zero: a row of which one
rank has both parts.)
"""

import triton
import triton.language as tl

#: Columns of the tables of tiles, of the hyperparameters and of the sums, see triton_step.py.
TILE = tl.constexpr(13)
HYPER = tl.constexpr(12)

#: What a product reads: W, U of M and V, or U of M and V that are updated first.
WEIGHTS = tl.constexpr(0)
UPDATES = tl.constexpr(1)
MOMENTS = tl.constexpr(2)

#: What an elementwise pass does: everything at the scheduled rate, take that back, move at the
#: matrix's rate.
STEP = tl.constexpr(0)
UNDO = tl.constexpr(1)
MOVE = tl.constexpr(2)


@triton.jit
def _tensor(pointers, buffer, which: tl.constexpr):
    """The address of a buffer's W, G, M or V (0 to 3)."""
    return tl.load(pointers + buffer * 4 + which).to(tl.pointer_type(tl.float32))


@triton.jit
def _moments(grad, exp_avg, exp_avg_sq, hyper):
    exp_avg = exp_avg + tl.load(hyper) * (grad - exp_avg)
    return exp_avg, exp_avg_sq * tl.load(hyper + 1) + tl.load(hyper + 2) * grad * grad


@triton.jit
def _direction(exp_avg, exp_avg_sq, hyper):
    """U = m / (√v · scale + ε'), both bias corrections in the constants."""
    return exp_avg / (tl.sqrt(exp_avg_sq) * tl.load(hyper + 3) + tl.load(hyper + 4))


@triton.jit
def _rows(pointers, buffer, at, inside, hyper, SOURCE: tl.constexpr):
    """The elements of a block of W or U, 0 outside."""
    if SOURCE == 0:
        return tl.load(_tensor(pointers, buffer, 0) + at, mask=inside, other=0.0)
    exp_avg = tl.load(_tensor(pointers, buffer, 2) + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(_tensor(pointers, buffer, 3) + at, mask=inside, other=0.0)
    return tl.where(inside, _direction(exp_avg, exp_avg_sq, hyper), 0.0)


@triton.jit(do_not_specialize_on_alignment=["mask"])
def products(
    tiles,
    units,
    pointers,
    hypers,
    mask,
    x,
    left,
    partial,
    sums,
    BACK: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Z and YᵀY of a unit's rows to ``partial``, or Y of rows that are cut to ``left``; with
    MOMENTS, Σ u² to ``sums``.

    One read: row by row y = r X and Z += rᵀ y, the second time from the cache. BACK: Y are in
    ``left``, summed.
    """
    unit = tl.program_id(0)
    tile = tiles + tl.load(units + unit * 4) * TILE
    first = tl.load(units + unit * 4 + 1)
    count = tl.load(units + unit * 4 + 2)
    place = tl.load(units + unit * 4 + 3)
    buffer = tl.load(tile)
    offset = tl.load(tile + 1)
    cols = tl.load(tile + 3)
    stride = tl.load(tile + 4)
    matrix = tl.load(tile + 5)
    n = tl.load(tile + 8)
    width = tl.load(tile + 9)
    slot = tl.load(tile + 11)
    counts = tl.load(tile + 12)
    hyper = hypers + buffer * HYPER
    is_there = (SOURCE == 0) | (tl.load(pointers + buffer * 4 + 2) != 0)
    if (tl.load(mask + matrix) != 0) & is_there:
        vectors = tl.arange(0, BLOCK)
        row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
        of_block = vectors < width
        gram = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        squares = 0.0
        z = partial + place
        z_from = tl.load(tile + 7) - tl.load(tile + 10) + width * n  # the tile's first column
        for begin in range(first, first + count, ROWS):
            rows = begin + row
            in_rows = rows < first + count
            y = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            lefts = left + slot + rows[:, None] * width + vectors[None, :]
            in_left = in_rows[:, None] & of_block[None, :]
            if BACK:
                y = tl.load(lefts, mask=in_left, other=0.0)
            if (not BACK) | (SOURCE == 2):
                for start in range(0, cols, COLS):
                    inside = in_rows[:, None] & ((start + col) < cols)[None, :]
                    at = offset + rows[:, None] * stride + (start + col)[None, :]
                    if SOURCE == 2:
                        grad = tl.load(_tensor(pointers, buffer, 1) + at, mask=inside, other=0.0)
                        exp_avg = tl.load(_tensor(pointers, buffer, 2) + at, mask=inside, other=0.0)
                        second = _tensor(pointers, buffer, 3) + at
                        exp_avg_sq = tl.load(second, mask=inside, other=0.0)
                        exp_avg, exp_avg_sq = _moments(grad, exp_avg, exp_avg_sq, hyper)
                        tl.store(_tensor(pointers, buffer, 2) + at, exp_avg, mask=inside)
                        tl.store(_tensor(pointers, buffer, 3) + at, exp_avg_sq, mask=inside)
                        a = tl.where(inside, _direction(exp_avg, exp_avg_sq, hyper), 0.0)
                        squares += tl.sum(tl.sum(a * a, axis=1), axis=0)
                    else:
                        a = _rows(pointers, buffer, at, inside, hyper, SOURCE)
                    if not BACK:
                        for j in tl.static_range(BLOCK):
                            in_x = ((start + col) < cols) & (j < width)
                            xs = tl.load(
                                x + tl.load(tile + 6) + j * n + start + col, mask=in_x, other=0.0
                            )
                            y += tl.where(
                                vectors[None, :] == j, tl.sum(a * xs[None, :], axis=1)[:, None], 0.0
                            )
            if (not BACK) & (slot >= 0):
                tl.atomic_add(lefts, y, mask=in_left)
            else:
                if width > 0:
                    if (not BACK) | (counts != 0):
                        gram += tl.sum(y[:, :, None] * y[:, None, :], axis=0)
                    tl.debug_barrier()
                    for start in range(0, cols, COLS):
                        in_cols = (start + col) < cols
                        inside = in_rows[:, None] & in_cols[None, :]
                        at = offset + rows[:, None] * stride + (start + col)[None, :]
                        a = _rows(pointers, buffer, at, inside, hyper, SOURCE)
                        for j in tl.static_range(BLOCK):
                            yj = tl.sum(tl.where(vectors[None, :] == j, y, 0.0), axis=1)
                            to = z + z_from + j * n + start + col
                            is_to = in_cols & (j < width)
                            old = tl.load(to, mask=is_to, other=0.0)
                            tl.store(to, old + tl.sum(a * yj[:, None], axis=0), mask=is_to)
        if (BACK | (slot < 0)) & (width > 0):
            at = width * n + vectors[:, None] * width + vectors[None, :]
            tl.store(z + at, gram, mask=of_block[:, None] & of_block[None, :])
        if (SOURCE == 2) & (width > 0):
            tl.store(sums + unit * 3, squares)


@triton.jit(do_not_specialize_on_alignment=["mask"])
def add_partials(shapes, spans, places, mask, partial, z, LENGTH: tl.constexpr):
    """Z and YᵀY of a matrix: what its units have summed, in their order."""
    matrix = tl.load(spans + tl.program_id(0) * 3)
    start = tl.load(spans + tl.program_id(0) * 3 + 1)
    stop = tl.load(spans + tl.program_id(0) * 3 + 2)
    if tl.load(mask + matrix) != 0:
        shape = shapes + matrix * 5
        n, width = tl.load(shape + 2), tl.load(shape + 3)
        at = tl.program_id(1) * LENGTH + tl.arange(0, LENGTH)
        inside = at < width * n + width * width
        to = z + tl.load(shape + 1) + at
        total = tl.load(to, mask=inside, other=0.0)
        for unit in range(start, stop):
            total += tl.load(partial + tl.load(places + unit * 4 + 3) + at, mask=inside, other=0.0)
        tl.store(to, total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["mask"])
def elementwise(
    tiles,
    units,
    pointers,
    hypers,
    mask,
    rates,
    sums,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One pass of AdamW's arithmetic over a unit (STEP, UNDO or MOVE); Σ u², Σ w² before and after
    to ``sums``.
    """
    unit = tl.program_id(0)
    tile = tiles + tl.load(units + unit * 4) * TILE
    first, count = tl.load(units + unit * 4 + 1), tl.load(units + unit * 4 + 2)
    buffer = tl.load(tile)
    offset = tl.load(tile + 1)
    cols = tl.load(tile + 3)
    stride = tl.load(tile + 4)
    matrix, width = tl.load(tile + 5), tl.load(tile + 9)
    hyper = hypers + buffer * HYPER
    is_rest = (matrix < 0) & (MODE == 0)
    # There may be no matrix, and no mask.
    is_active = tl.load(mask + matrix, mask=matrix >= 0, other=0) != 0
    if (is_rest | is_active) & (tl.load(pointers + buffer * 4 + 2) != 0):
        row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
        rate = tl.load(hyper + 5).to(tl.float64)
        if MODE == 2:
            rate = tl.load(rates + matrix)
        decay = (1.0 - rate * tl.load(hyper + 6)).to(tl.float32)
        size = (rate / tl.load(hyper + 7)).to(tl.float32)  # α / (1 - β₁ᵗ)
        squares, before, after = 0.0, 0.0, 0.0
        for begin in range(first, first + count, ROWS):
            rows = begin + row
            for start in range(0, cols, COLS):
                inside = (rows < first + count)[:, None] & ((start + col) < cols)[None, :]
                at = offset + rows[:, None] * stride + (start + col)[None, :]
                weight = tl.load(_tensor(pointers, buffer, 0) + at, mask=inside, other=0.0)
                exp_avg = tl.load(_tensor(pointers, buffer, 2) + at, mask=inside, other=0.0)
                exp_avg_sq = tl.load(_tensor(pointers, buffer, 3) + at, mask=inside, other=0.0)
                if MODE == 0:
                    grad = tl.load(_tensor(pointers, buffer, 1) + at, mask=inside, other=0.0)
                    exp_avg, exp_avg_sq = _moments(grad, exp_avg, exp_avg_sq, hyper)
                    tl.store(_tensor(pointers, buffer, 2) + at, exp_avg, mask=inside)
                    tl.store(_tensor(pointers, buffer, 3) + at, exp_avg_sq, mask=inside)
                    update = tl.where(inside, _direction(exp_avg, exp_avg_sq, hyper), 0.0)
                    squares += tl.sum(tl.sum(update * update, axis=1), axis=0)
                    before += tl.sum(tl.sum(weight * weight, axis=1), axis=0)
                quotient = exp_avg / (tl.sqrt(exp_avg_sq) / tl.load(hyper + 8) + tl.load(hyper + 9))
                quotient = tl.where(inside, quotient, 0.0)
                if MODE == 1:
                    weight = (weight + size * quotient) / decay
                else:
                    weight = weight * decay - size * quotient
                after += tl.sum(tl.sum(weight * weight, axis=1), axis=0)
                tl.store(_tensor(pointers, buffer, 0) + at, weight, mask=inside)
        if width > 0:
            tl.store(sums + unit * 3, squares)
            tl.store(sums + unit * 3 + 1, before)
            tl.store(sums + unit * 3 + 2, after)


@triton.jit(do_not_specialize_on_alignment=["mask"])
def add_sums(spans, mask, partial, sums, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Columns FIRST to LAST, without the latter, of a matrix's sums: those of its units, in their
    order.
    """
    matrix = tl.load(spans + tl.program_id(0) * 3)
    start = tl.load(spans + tl.program_id(0) * 3 + 1)
    stop = tl.load(spans + tl.program_id(0) * 3 + 2)
    if tl.load(mask + matrix) != 0:
        column = tl.arange(0, 4)
        inside = (column >= FIRST) & (column < LAST)
        total = tl.load(sums + matrix * 3 + column, mask=inside, other=0.0)
        for unit in range(start, stop):
            total += tl.load(partial + unit * 3 + column, mask=inside, other=0.0).to(tl.float64)
        tl.store(sums + matrix * 3 + column, total, mask=inside)


@triton.jit
def _row(a, k: tl.constexpr, index):
    """Row k of a square matrix."""
    return tl.sum(tl.where(index[:, None] == k, a, 0.0), axis=0)


@triton.jit
def _at(a, k: tl.constexpr, index):
    return tl.sum(tl.where(index == k, a, 0.0), axis=0)


@triton.jit
def _inverse_factor(gram, least, index, BLOCK: tl.constexpr):
    """Return L⁻¹ where gram = L Lᵀ has ones on its diagonal; rows that depend on those above them
    are 0.
    """
    rest = gram
    inverse = tl.where(index[:, None] == index[None, :], 1.0, 0.0).to(tl.float64)
    for k in tl.static_range(BLOCK):
        column = _row(rest, k, index)  # symmetric
        pivot = _at(column, k, index)
        scale = tl.where(pivot > least, 1.0 / tl.sqrt(tl.maximum(pivot, 1e-300)), 0.0)
        column = tl.where(index >= k, column * scale, 0.0)  # of L
        row = _row(inverse, k, index) * scale
        below = tl.where(index > k, column, 0.0)
        inverse = tl.where(
            index[:, None] == k, row[None, :], inverse - below[:, None] * row[None, :]
        )
        rest = rest - column[:, None] * column[None, :]
    return inverse


@triton.jit
def _product(a, b):
    return tl.sum(a[:, :, None] * b[None, :, :], axis=1)


@triton.jit
def _trace(a, index):
    return tl.sum(tl.sum(tl.where(index[:, None] == index[None, :], a, 0.0), axis=1), axis=0)


@triton.jit
def _largest(a, index):
    """The largest eigenvalue of a symmetric matrix without negative ones, by squaring: exact but
    for near ties.
    """
    size = _trace(a, index)
    power = a / tl.where(size > 0, size, 1.0)
    for _ in range(20):
        power = _product(power, power)
        power = power / tl.maximum(_trace(power, index), 1e-300)
    return tl.maximum(_trace(_product(a, power), index), 0.0)


@triton.jit(do_not_specialize_on_alignment=["mask", "more", "sigma", "gain"])
def orthonormalize(
    shapes,
    batch,
    mask,
    more,
    x,
    z,
    sigma,
    gain,
    independent,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):
    """The next block, σ₁ and gain of one matrix: spectral/ritz.py, with Cholesky's factors in place
    of eigenvectors.
    """
    matrix = tl.load(batch + tl.program_id(0))
    if tl.load(mask + matrix) != 0:
        shape = shapes + matrix * 5
        x += tl.load(shape)
        gram_y_at = z + tl.load(shape + 4)
        z += tl.load(shape + 1)
        n, width = tl.load(shape + 2), tl.load(shape + 3)
        index, col = tl.arange(0, BLOCK), tl.arange(0, COLS)
        pair = (index < width)[:, None] & (index < width)[None, :]
        diagonal = index[:, None] == index[None, :]
        pairs_at = gram_y_at + index[:, None] * width + index[None, :]
        gram_y = tl.load(pairs_at, mask=pair, other=0.0).to(tl.float64)
        gram_z = tl.zeros((BLOCK, BLOCK), dtype=tl.float64)
        length = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, n, COLS):
            inside = (index < width)[:, None] & ((start + col) < n)[None, :]
            at = index[:, None] * n + (start + col)[None, :]
            rows = tl.load(z + at, mask=inside, other=0.0).to(tl.float64)
            old = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
            gram_z += tl.sum(rows[:, None, :] * rows[None, :, :], axis=2)
            length += tl.sum(old * old, axis=1)

        lengths_y = tl.sqrt(tl.sum(tl.where(diagonal, gram_y, 0.0), axis=1))
        lengths_z = tl.sqrt(tl.sum(tl.where(diagonal, gram_z, 0.0), axis=1))
        scale_y = tl.where(lengths_y > 0, 1.0 / tl.where(lengths_y > 0, lengths_y, 1.0), 0.0)
        scale_z = tl.where(lengths_z > 0, 1.0 / tl.where(lengths_z > 0, lengths_z, 1.0), 0.0)
        to_y = _inverse_factor(
            gram_y * scale_y[:, None] * scale_y[None, :], independent, index, BLOCK
        )
        to_y = to_y * scale_y[None, :]
        ratio = _product(_product(to_y, gram_z), tl.trans(to_y))
        value = tl.sqrt(_largest(ratio, index))
        # NaN and infinity are not less than anything
        total = tl.sum(tl.sum(gram_y + gram_z, axis=1), axis=0)
        finite = total - total == 0
        value = tl.where(finite, value, float("nan"))
        tl.store(sigma + matrix, value)

        good = (value > 0) & (value < float("inf"))
        safe = tl.where(
            (value > 1e-9) & (value < 1e9), 1.0, 1.0 / tl.maximum(tl.where(good, value, 1.0), 1e-38)
        )
        norm = tl.sqrt(_at(length, 0, index))
        is_one = (norm > 0.5) & (norm < 2.0)
        gained = 1.0 - tl.sqrt(_largest(gram_y, index)) / (norm * tl.where(good, value, 1.0))
        tl.store(gain + matrix, tl.where(good & is_one, gained, float("inf")))
        retry = tl.where(value == 0, 1e28, 1e-28)
        retry = tl.where((tl.load(more + matrix) != 0) & is_one, retry, 1.0) / norm
        to_z = _inverse_factor(gram_z * scale_z[:, None] * scale_z[None, :], 1e-10, index, BLOCK)
        is_new = tl.sum(tl.where(diagonal, to_z, 0.0), axis=1) > 0
        to_z = to_z * scale_z[None, :] * safe
        for start in range(0, n, COLS):
            inside = (index < width)[:, None] & ((start + col) < n)[None, :]
            at = index[:, None] * n + (start + col)[None, :]
            rows = tl.load(z + at, mask=inside, other=0.0).to(tl.float64)
            old = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
            fresh = tl.sum(to_z[:, :, None] * rows[None, :, :], axis=1)
            fresh = tl.where(good, tl.where(is_new[:, None], fresh, old / norm * safe), old * retry)
            tl.store(x + at, fresh.to(tl.float32), mask=inside)
