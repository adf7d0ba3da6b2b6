"""Rule 1 by projection (rule.project): how updates that are too large change, and their move."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import rule
from .adamw import direction
from .collect import line, lines_of, nothing, places, reads_wide
from .numbers import (
    BOUND,
    CLIPPED,
    CLIPS,
    LR,
    OF_UPDATE,
    SHARE,
    UNSEEN,
    WHOLE,
)
from .orthonormalize import inverse_factor, product
from .tables import BLOCK_SIZE, HYPER_SIZE, PIECE_SIZE, UNIT_SIZE

_UNSEEN = tl.constexpr(rule.UNSEEN)
_NOTHING = tl.constexpr(rule.NOTHING)
_SUMS = tl.constexpr(rule.SUMS)

#: Sweeps of Jacobi's method, which converges quadratically: 16 by 16 matrices take 6 or 7.
_SWEEPS = tl.constexpr(8)


@triton.jit
def _diagonalize(a, index, BLOCK: tl.constexpr):
    """Return VᵀAV, which is diagonal, and Vᵀ, of a symmetric matrix: Jacobi's method, BLOCK / 2
    rotations at once, of the pairs of a round robin.
    """
    diagonal = index[:, None] == index[None, :]
    axes = tl.where(diagonal, 1.0, 0.0).to(tl.float64)
    turns = _SWEEPS * (BLOCK - 1)
    for turn in range(0, turns):
        number = turn % (BLOCK - 1)
        partner = (number - index + BLOCK - 1) % (BLOCK - 1)
        partner = tl.where(partner == index, BLOCK - 1, partner)
        partner = tl.where(index == BLOCK - 1, number * (BLOCK // 2) % (BLOCK - 1), partner)
        is_pair = index[None, :] == partner[:, None]
        beside = tl.sum(tl.where(is_pair, a, 0.0), axis=1)
        own = tl.sum(tl.where(diagonal, a, 0.0), axis=1)
        other = tl.sum(
            tl.where(is_pair, tl.sum(tl.where(diagonal, a, 0.0), axis=0)[None, :], 0.0), axis=1
        )
        is_first = index < partner
        apart = tl.where(is_first, other - own, own - other)
        ratio = apart / (2.0 * tl.where(beside == 0, 1.0, beside))
        size = tl.abs(ratio) + tl.sqrt(1.0 + ratio * ratio)
        tangent = tl.where(beside == 0, 0.0, tl.where(ratio < 0, -1.0, 1.0) / size)
        cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
        sine = tl.where(is_first, tangent, -tangent) * cosine
        turned = tl.where(diagonal, cosine[:, None], tl.where(is_pair, sine[:, None], 0.0))
        a = product(turned, product(a, turned))
        axes = product(turned, axes)
    return a, axes


@triton.jit(do_not_specialize=["matrices"])
def clip(
    blocks,
    masks,
    numbers,
    z,
    grams,
    factors,
    independent,
    matrices,
    BLOCK: tl.constexpr,
):
    """M of one matrix whose update is too large, what is left of the part that the vectors do not
    see, and the share of the update that is left: the update is rate · U + Y M Z.
    """
    block = blocks + tl.program_id(0) * BLOCK_SIZE
    operand, matrix = tl.load(block), tl.load(block + 1)
    numbers += matrix
    is_active = tl.load(masks + matrices * CLIPS + matrix) != 0
    if (operand == 1) & is_active:
        n, width = tl.load(block + 4), tl.load(block + 5)
        index = tl.arange(0, BLOCK)
        pair = (index < width)[:, None] & (index < width)[None, :]
        diagonal = index[:, None] == index[None, :]
        pairs_at = z + tl.load(block + 3) + width * n + index[:, None] * width + index[None, :]
        gram_y = tl.load(pairs_at, mask=pair, other=0.0).to(tl.float64)
        place = matrix * BLOCK * BLOCK + index[:, None] * BLOCK + index[None, :]
        gram_z = tl.load(grams + matrices * BLOCK * BLOCK + place)
        total = tl.sum(tl.sum(gram_y + gram_z, axis=1), axis=0)
        is_finite = total - total == 0
        gram_y = tl.where(is_finite, gram_y, 0.0)
        gram_z = tl.where(is_finite, gram_z, 0.0)
        lengths = tl.sqrt(tl.sum(tl.where(diagonal, gram_y, 0.0), axis=1))
        scale = tl.where(lengths > 0, 1.0 / tl.where(lengths > 0, lengths, 1.0), 0.0)
        to_y = inverse_factor(gram_y * scale[:, None] * scale[None, :], independent, index, BLOCK)
        of_y = tl.trans(to_y * scale[None, :])
        inner, axes = _diagonalize(product(of_y, product(gram_z, of_y)), index, BLOCK)
        squares = tl.sum(tl.where(diagonal, inner, 0.0), axis=1)
        most = tl.max(squares, axis=0)
        is_seen = (squares > most * _NOTHING) & (squares > 0)
        theta = tl.sqrt(tl.where(is_seen, squares, 1.0))
        lr, bound = tl.load(numbers + matrices * LR), tl.load(numbers + matrices * BOUND)
        norm = tl.load(numbers + matrices * OF_UPDATE)  # squared
        rest = tl.maximum(norm - tl.sum(tl.where(is_seen, squares, 0.0), axis=0), 0.0)
        smallest = tl.min(tl.where(is_seen, theta, float("inf")), axis=0)
        unseen = tl.minimum(smallest * _UNSEEN, tl.sqrt(rest + norm * _SUMS))
        count = tl.sum(is_seen.to(tl.int32), axis=0)
        is_whole = (tl.load(numbers + matrices * WHOLE) != 0) & (count == width)
        # Of nothing that is not seen nothing is to be clipped.
        most_rate = tl.where(unseen > 0, bound / tl.where(unseen > 0, unseen, 1.0), float("inf"))
        rate = tl.where(is_whole, lr, tl.minimum(lr, most_rate))
        kept = tl.minimum(lr * theta, bound)
        of_theta = tl.where(is_seen, kept / theta - rate, 0.0)
        axes = product(tl.trans(axes), tl.trans(of_y))
        factor = product(axes, axes * of_theta[:, None])
        tl.store(factors + place, factor.to(tl.float32))
        after = tl.sum(tl.where(is_seen, kept * kept, 0.0), axis=0) + rate * rate * rest
        share = tl.sqrt(after) / (lr * tl.sqrt(norm))
        clipped = tl.sum((is_seen & (lr * theta > bound)).to(tl.int32), axis=0)
        tl.store(numbers + matrices * SHARE, share)
        tl.store(numbers + matrices * UNSEEN, rate / lr)
        tl.store(numbers + matrices * CLIPPED, clipped.to(tl.float64))


@triton.jit
def _rows(
    piece,
    strip,
    pointers,
    hyper,
    y,
    apart,
    z,
    factor,
    rate,
    decay,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """Move columns of a strip's rows, ROWS at a time; return Σ w² after it. A thread has its own
    columns, and C = M Z of those in registers.
    """
    base, first, second, z, cols, stride, n, start, shift = places(
        piece, strip, pointers, z, WIDE, STATE, OF_M, OF_V
    )
    count, width = tl.load(strip + 2), tl.load(strip + 13)
    of_root, of_one = tl.load(hyper + 3), tl.load(hyper + 4)
    col, vectors = start + tl.arange(0, COLS), tl.arange(0, BLOCK)
    change = nothing(z, n, col, cols, vectors)
    squares = tl.sum(change, axis=0)
    for k in range(0, width):
        of_z = tl.load(z + k * n + col, mask=col < n, other=0.0)
        change += tl.load(factor + k * BLOCK + vectors)[:, None] * of_z[None, :]
    col -= shift
    inside = (col >= 0) & (col < cols)
    for begin in range(0, count, ROWS):
        for r in tl.static_range(ROWS):
            # Behind the last row nothing is written.
            row = tl.minimum(begin + r, count - 1)
            is_there = inside & (begin + r < count)
            at = row * stride + col
            weight = tl.load(base + at, mask=is_there, other=0.0).to(tl.float32)
            exp_avg = tl.load(first + at, mask=is_there, other=0.0).to(tl.float32)
            exp_avg_sq = tl.load(second + at, mask=is_there, other=1.0).to(tl.float32)
            of_row = line(y, row, apart, vectors, width, BLOCK, WIDE)
            moved = tl.sum(of_row[:, None] * change, axis=0)
            moved += rate * direction(exp_avg, exp_avg_sq, of_root, of_one)
            weight = (weight * decay - moved).to(STATE)
            tl.store(base + at, weight, mask=is_there)
            kept = tl.where(is_there, weight.to(tl.float32), 0.0)
            squares += kept * kept
    return tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["begin", "matrices"])
def project(
    pieces,
    begin,
    strips,
    pointers,
    hypers,
    masks,
    numbers,
    left,
    lines,
    z,
    factors,
    sums,
    matrices,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """Move a piece of a matrix whose singular values are clipped; Σ w² after it to ``sums``."""
    number = begin + tl.program_id(0)
    piece = pieces + number * PIECE_SIZE
    matrix = tl.load(piece + 1)
    numbers += matrix
    if tl.load(masks + matrices * CLIPS + matrix) != 0:
        squares = 0.0
        if tl.load(piece + 7) != 0:
            strip = strips + tl.load(piece + 6) * UNIT_SIZE
            buffer = tl.load(strip)
            y, apart = lines_of(strip, left, lines, BLOCK)
            if tl.load(pointers + buffer * 4 + 2) != 0:
                hyper = hypers + buffer * HYPER_SIZE
                factor = factors + matrix * BLOCK * BLOCK
                lr = tl.load(numbers + matrices * LR)
                rate = (lr * tl.load(numbers + matrices * UNSEEN)).to(tl.float32)
                decay = (1.0 - lr * tl.load(hyper + 6)).to(tl.float32)
                is_wide = reads_wide(strip, piece, pointers, apart, 1, BLOCK, STATE, OF_M, OF_V)
                if is_wide & ((tl.load(pointers + buffer * 4) & 15) == 0):
                    squares = _rows(
                        piece, strip, pointers, hyper, y, apart, z, factor, rate, decay,
                        BLOCK, ROWS, COLS, True, STATE, OF_M, OF_V,
                    )  # fmt: skip
                else:
                    squares = _rows(
                        piece, strip, pointers, hyper, y, apart, z, factor, rate, decay,
                        BLOCK, ROWS, COLS, False, STATE, OF_M, OF_V,
                    )  # fmt: skip
        tl.store(sums + number, squares)
