"""The small algebra of an iteration: spectral/ritz.py, with Cholesky's factors in place of
eigenvectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import FRESH, GAIN, LEAST, MAKING, MOST, OF_UPDATE, PROJECTS, SIGMA
from .tables import BLOCK_SIZE


@triton.jit
def _row(a, k: tl.constexpr, index):
    """Row k of a square matrix."""
    return tl.sum(tl.where(index[:, None] == k, a, 0.0), axis=0)


@triton.jit
def _at(a, k: tl.constexpr, index):
    return tl.sum(tl.where(index == k, a, 0.0), axis=0)


@triton.jit
def inverse_factor(gram, least, index, BLOCK: tl.constexpr):
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
def product(a, b):
    """AᵀB: so a thread has all that it adds up."""
    return tl.sum(a[:, :, None] * b[:, None, :], axis=0)


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
    for _ in range(4):
        for _again in tl.static_range(5):  # a trace of 1 becomes 16⁻³¹ at least
            power = product(power, power)
        power = power * (1.0 / tl.maximum(_trace(power, index), 1e-300))
    return tl.maximum(tl.sum(tl.sum(a * power, axis=1), axis=0), 0.0)


@triton.jit
def _gram_of_rows(z, n, width, BLOCK: tl.constexpr):
    """Z Zᵀ, float64."""
    AT_ONCE: tl.constexpr = 64 if BLOCK == 4 else 4096 // (BLOCK * BLOCK)
    index, lane = tl.arange(0, BLOCK), tl.arange(0, AT_ONCE)
    row, other = index[:, None, None], index[None, :, None]
    acc = tl.zeros((BLOCK, BLOCK, AT_ONCE), dtype=tl.float64)
    for start in range(0, n, AT_ONCE):
        col = (start + lane)[None, None, :]
        # Read twice, once where each thread needs it.
        a = tl.load(z + row * n + col, mask=(row < width) & (col < n), other=0.0)
        b = tl.load(z + other * n + col, mask=(other < width) & (col < n), other=0.0)
        acc += a.to(tl.float64) * b.to(tl.float64)
    return tl.sum(acc, axis=2)


@triton.jit
def _block(
    block,
    more,
    x,
    z,
    sigma,
    gain,
    factors,
    grams,
    independent,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The next X, σ₁ and the gain of one matrix; Z Zᵀ to ``grams``."""
    x += tl.load(block + 2)
    z += tl.load(block + 3)
    n, width = tl.load(block + 4), tl.load(block + 5)
    index, lane = tl.arange(0, BLOCK), tl.arange(0, LANES)
    pair = (index < width)[:, None] & (index < width)[None, :]
    diagonal = index[:, None] == index[None, :]
    pairs_at = z + width * n + index[:, None] * width + index[None, :]
    gram_y = tl.load(pairs_at, mask=pair, other=0.0).to(tl.float64)
    gram_z = _gram_of_rows(z, n, width, BLOCK)
    length = tl.zeros((LANES,), dtype=tl.float64)
    for start in range(0, n, LANES):
        old = tl.load(x + start + lane, mask=(start + lane) < n, other=0.0).to(tl.float64)
        length += old * old
    norm = tl.sqrt(tl.sum(length, axis=0))

    lengths_y = tl.sqrt(tl.sum(tl.where(diagonal, gram_y, 0.0), axis=1))
    lengths_z = tl.sqrt(tl.sum(tl.where(diagonal, gram_z, 0.0), axis=1))
    scale_y = tl.where(lengths_y > 0, 1.0 / tl.where(lengths_y > 0, lengths_y, 1.0), 0.0)
    scale_z = tl.where(lengths_z > 0, 1.0 / tl.where(lengths_z > 0, lengths_z, 1.0), 0.0)
    to_y = inverse_factor(gram_y * scale_y[:, None] * scale_y[None, :], independent, index, BLOCK)
    to_y = to_y * scale_y[None, :]
    of_y = tl.trans(to_y)
    ratio = product(of_y, product(gram_z, of_y))
    value = tl.sqrt(_largest(ratio, index))
    # NaN and infinity are not less than anything
    total = tl.sum(tl.sum(gram_y + gram_z, axis=1), axis=0)
    value = tl.where(total - total == 0, value, float("nan"))
    tl.store(sigma, value)

    good = (value > 0) & (value < float("inf"))
    safe = tl.where(
        (value > 1e-9) & (value < 1e9), 1.0, 1.0 / tl.maximum(tl.where(good, value, 1.0), 1e-38)
    )
    is_one = (norm > 0.5) & (norm < 2.0)
    gained = 1.0 - tl.sqrt(_largest(gram_y, index)) / (norm * tl.where(good, value, 1.0))
    gained = tl.where(good & is_one, gained, float("inf"))
    tl.store(gain, gained)
    retry = tl.where(value == 0, 1e28, 1e-28)
    retry = tl.where(more & is_one, retry, 1.0) / norm
    to_z = inverse_factor(gram_z * scale_z[:, None] * scale_z[None, :], 1e-10, index, BLOCK)
    is_new = tl.sum(tl.where(diagonal, to_z, 0.0), axis=1) > 0
    to_z = to_z * scale_z[None, :] * safe
    tl.store(grams + index[:, None] * BLOCK + index[None, :], gram_z)
    # Where every thread finds it.
    tl.store(factors + index[:, None] * BLOCK + index[None, :], to_z)
    tl.debug_barrier()
    for start in range(0, n, LANES):
        in_cols = (start + lane) < n
        inside = (index < width)[:, None] & in_cols[None, :]
        at = index[:, None] * n + (start + lane)[None, :]
        old = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
        fresh = tl.zeros((BLOCK, LANES), dtype=tl.float64)
        for k in range(0, width):
            row = tl.load(z + k * n + start + lane, mask=in_cols, other=0.0).to(tl.float64)
            fresh += tl.load(factors + index * BLOCK + k)[:, None] * row[None, :]
        fresh = tl.where(good, tl.where(is_new[:, None], fresh, old / norm * safe), old * retry)
        tl.store(x + at, fresh.to(tl.float32), mask=inside)


@triton.jit
def _copy(source, target, start, size, LANES: tl.constexpr):
    """Copy numbers from ``start`` on."""
    lane = start + tl.arange(0, LANES)
    for begin in range(0, size, LANES):
        inside = begin + lane < start + size
        tl.store(target + begin + lane, tl.load(source + begin + lane, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=["number", "rounds_w", "rounds_u", "matrices"],
)
def orthonormalize(
    blocks,
    masks,
    numbers,
    x,
    z,
    left,
    kept_z,
    kept_left,
    factors,
    grams,
    independent,
    settled,
    number,
    rounds_w,
    rounds_u,
    matrices,
    BLOCK_W: tl.constexpr,
    BLOCK_U: tl.constexpr,
    LANES: tl.constexpr,
):
    """The next block, σ₁ and gain of one matrix after iteration ``number``, and whether it makes
    another. What projection needs is kept: Z, YᵀY and Y of cut rows, which further iterations of
    other matrices sum over ranks again, and Z Zᵀ in ``grams``.
    """
    block = blocks + tl.program_id(0) * BLOCK_SIZE
    operand, matrix = tl.load(block), tl.load(block + 1)
    mask = masks + matrices * (operand + MAKING) + matrix
    numbers += matrix
    if tl.load(mask) != 0:
        rounds = tl.where(operand == 0, rounds_w, rounds_u)
        n, width = tl.load(block + 4), tl.load(block + 5)
        most = tl.load(numbers + matrices * (operand + MOST))
        least = tl.load(numbers + matrices * (operand + LEAST))
        may_follow = (number + 1 < rounds) & (number + 1 < most)
        sigma = numbers + matrices * (operand + SIGMA)
        gain = numbers + matrices * (operand + GAIN)
        if (operand == 1) & (number == 0):
            if tl.load(masks + matrices * FRESH + matrix) != 0:
                squares = tl.load(z + tl.load(block + 3) + width * (n + width))
                tl.store(numbers + matrices * OF_UPDATE, squares.to(tl.float64))
        factors += tl.program_id(0) * BLOCK_U * BLOCK_U
        grams += (operand * matrices + matrix) * BLOCK_U * BLOCK_U
        if (BLOCK_W != BLOCK_U) & (operand == 0):
            _block(
                block, may_follow, x, z, sigma, gain, factors, grams, independent, BLOCK_W, LANES
            )
        else:
            _block(
                block, may_follow, x, z, sigma, gain, factors, grams, independent, BLOCK_U, LANES
            )
        tl.debug_barrier()
        gained = tl.load(gain)
        goes_on = may_follow & ((number + 1 < least) | (gained > settled) | (gained != gained))
        tl.store(mask, goes_on.to(tl.uint8))
        line = tl.arange(0, LANES)
        if (operand == 1) & (tl.load(numbers + matrices * PROJECTS) != 0):
            _copy(z, kept_z, tl.load(block + 3), width * (n + width), LANES)
            _copy(left, kept_left, tl.load(block + 6), tl.load(block + 7), LANES)
        # Y of cut rows are added to zeros.
        for start in range(0, tl.load(block + 7), LANES):
            inside = start + line < tl.load(block + 7)
            tl.store(left + tl.load(block + 6) + start + line, 0.0, mask=inside)
