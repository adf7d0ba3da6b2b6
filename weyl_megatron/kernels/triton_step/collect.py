"""The second read of W and U in an iteration: Z = Aᵀ Y, strip by strip; and YᵀY of all units."""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw import address, elements
from .numbers import MAKING
from .tables import HYPER_SIZE, PIECE_SIZE, UNIT_SIZE


@triton.jit
def line(y, row, apart, vectors, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A row of Y."""
    if WIDE:
        return tl.load(y + row * BLOCK + vectors)
    return tl.load(y + row * apart + vectors, mask=vectors < width, other=0.0)


@triton.jit
def reads_wide(
    strip,
    piece,
    pointers,
    apart,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """Whether rows of a strip, of Y and of Z can be read 16 bytes at a time."""
    size: tl.constexpr = 4 if STATE == tl.float32 else 2
    m_size: tl.constexpr = 4 if OF_M == tl.float32 else 2
    v_size: tl.constexpr = 4 if OF_V == tl.float32 else 2
    least: tl.constexpr = size if OPERAND == 0 else min(m_size, v_size)
    place = pointers + tl.load(strip) * 4
    odd = (tl.load(strip + 1) | tl.load(strip + 4)) * least
    if OPERAND == 0:
        odd = odd | tl.load(place)
    else:
        odd = odd | tl.load(place + 2) | tl.load(place + 3)
    places = tl.load(strip + 10) | tl.load(piece + 2) | tl.load(piece + 3)
    odd = (odd & 15) | (places & 3) | (tl.load(strip + 3) & 7) | (apart ^ BLOCK)
    return odd == 0


@triton.jit
def lines_of(strip, left, lines, BLOCK: tl.constexpr):
    """Where Y of a strip's rows begin, and how far apart they are."""
    slot, apart = tl.load(strip + 12), tl.load(strip + 13)
    y = left + slot
    if slot < 0:
        y, apart = lines + tl.load(strip + 11), tl.full((), BLOCK, tl.int64)
    return y, apart


@triton.jit
def places(
    piece,
    strip,
    pointers,
    z,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """Where W, M and V of a strip and Z of a piece begin; the strip's columns and the distance
    between its rows; the matrix's columns, the first of them that the piece has, and the first that
    the strip has.
    """
    aligned: tl.constexpr = 16 if WIDE else 0
    size: tl.constexpr = 4 if STATE == tl.float32 else 2
    m_size: tl.constexpr = 4 if OF_M == tl.float32 else 2
    v_size: tl.constexpr = 4 if OF_V == tl.float32 else 2
    widest: tl.constexpr = max(size, m_size, v_size)
    of_w: tl.constexpr = aligned * size // widest
    of_m: tl.constexpr = aligned * m_size // widest
    of_v: tl.constexpr = aligned * v_size // widest
    buffer, offset = tl.load(strip), tl.load(strip + 1)
    cols, stride, shift = tl.load(strip + 3), tl.load(strip + 4), tl.load(strip + 10)
    n, start = tl.load(piece + 3), tl.load(piece + 5)
    z += tl.load(piece + 2)
    base = address(pointers, buffer, 0, offset, STATE, of_w)
    first = address(pointers, buffer, 2, offset, OF_M, of_m)
    second = address(pointers, buffer, 3, offset, OF_V, of_v)
    if WIDE:  # which the caller has seen
        cols = cols // 8 * 8
        stride = stride // 4 * 4
        n = n // 4 * 4
        start = start // 4 * 4
        shift = shift // 4 * 4
        z = tl.multiple_of(z, 16)
    return base, first, second, z, cols, stride, n, start, shift


@triton.jit
def nothing(z, n, col, cols, vectors):
    """Zeros for columns of all vectors. Nothing is read: so Triton gives every thread the columns
    that it loads.
    """
    never = (col < cols)[None, :] & (vectors < 0)[:, None]
    return tl.load(z + vectors[:, None] * n + col[None, :], mask=never, other=0.0)


@triton.jit
def _rows(
    piece,
    strip,
    pointers,
    hyper,
    y,
    apart,
    z,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """What a strip's rows add to columns of Z, ROWS at a time: a thread has its own columns, of all
    vectors.
    """
    base, first, second, z, cols, stride, n, start, shift = places(
        piece, strip, pointers, z, WIDE, STATE, OF_M, OF_V
    )
    count, width = tl.load(strip + 2), tl.load(strip + 13)
    of_root, of_one = tl.load(hyper + 3), tl.load(hyper + 4)
    col, vectors = start + tl.arange(0, COLS), tl.arange(0, BLOCK)
    total = nothing(z, n, col, cols, vectors)
    col -= shift
    inside = (col >= 0) & (col < cols)
    whole = count // ROWS * ROWS
    for begin in range(0, whole, ROWS):
        for r in tl.static_range(ROWS):
            at = (begin + r) * stride + col
            a = elements(base, first, second, at, inside, of_root, of_one, OPERAND)
            total += line(y, begin + r, apart, vectors, width, BLOCK, WIDE)[:, None] * a[None, :]
    for row in range(whole, count):
        a = elements(base, first, second, row * stride + col, inside, of_root, of_one, OPERAND)
        total += line(y, row, apart, vectors, width, BLOCK, WIDE)[:, None] * a[None, :]
    return total


@triton.jit
def _strip(
    piece,
    strips,
    pointers,
    hypers,
    left,
    lines,
    z,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """Columns of Z of one strip, four at a time where all that it reads is aligned."""
    strip = strips + tl.load(piece + 6) * UNIT_SIZE
    total = tl.zeros((BLOCK, COLS), dtype=tl.float32)
    if tl.load(piece + 7) != 0:
        buffer = tl.load(strip)
        y, apart = lines_of(strip, left, lines, BLOCK)
        if (OPERAND == 0) | (tl.load(pointers + buffer * 4 + 2) != 0):
            hyper = hypers + buffer * HYPER_SIZE
            if reads_wide(strip, piece, pointers, apart, OPERAND, BLOCK, STATE, OF_M, OF_V):
                total = _rows(
                    piece, strip, pointers, hyper, y, apart, z,
                    OPERAND, BLOCK, ROWS, COLS, True, STATE, OF_M, OF_V,
                )  # fmt: skip
            else:
                total = _rows(
                    piece, strip, pointers, hyper, y, apart, z,
                    OPERAND, BLOCK, ROWS, COLS, False, STATE, OF_M, OF_V,
                )  # fmt: skip
    return total


@triton.jit
def _columns(piece, total, sums, counters, z, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """Columns of Z. Of several strips whichever is done last adds all of them, in their order."""
    n, width, start = tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
    strips = tl.load(piece + 7)
    vectors, col = tl.arange(0, BLOCK), start + tl.arange(0, COLS)
    inside = (vectors < width)[:, None] & (col < n)[None, :]
    at = vectors[:, None] * n + col[None, :]
    z += tl.load(piece + 2)
    if strips <= 1:
        tl.store(z + at, total, mask=inside)
    else:
        sums += tl.load(piece + 9)
        counter = counters + tl.load(piece + 10)
        tl.store(sums + tl.load(piece + 8) * width * n + at, total, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(counter, 1) == strips - 1:
            total = tl.zeros((BLOCK, COLS), dtype=tl.float32)
            for number in range(0, strips):
                # Other multiprocessors wrote them: not from this one's cache.
                total += tl.load(
                    sums + number * width * n + at, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(z + at, total, mask=inside)
            tl.store(counter, 0)


@triton.jit
def _gram(
    piece,
    units,
    left,
    grams,
    sums,
    z,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEST: tl.constexpr,
):
    """YᵀY, and in a FIRST iteration Σ u² behind it."""
    n, width = tl.load(piece + 3), tl.load(piece + 4)
    first, last, cut = tl.load(piece + 11), tl.load(piece + 12), tl.load(piece + 13)
    many, vectors = tl.arange(0, 16), tl.arange(0, BLOCK)
    of_block = vectors < width
    z_at = z + tl.load(piece + 2) + width * n
    for j in range(0, width):
        gram = tl.zeros((16, BLOCK), dtype=tl.float64)
        for begin in range(first, cut, 16):
            there = begin + many
            at = (there * (WIDEST * WIDEST) + j * BLOCK)[:, None] + vectors[None, :]
            gram += tl.load(grams + at, mask=(there < cut)[:, None], other=0.0).to(tl.float64)
        for number in range(cut, last):
            unit = units + number * UNIT_SIZE
            rows, slot = tl.load(unit + 2), tl.load(unit + 12)
            if tl.load(unit + 10) == 0:  # just one piece of a row counts it
                for begin in range(0, rows, 16):
                    row = begin + many
                    inside = row < rows
                    y_at = left + slot + row[:, None] * width + vectors[None, :]
                    y = tl.load(y_at, mask=inside[:, None] & of_block[None, :], other=0.0)
                    yj = tl.load(left + slot + row * width + j, mask=inside, other=0.0)
                    gram += (y * yj[:, None]).to(tl.float64)
        tl.store(z_at + j * width + vectors, tl.sum(gram, axis=0).to(tl.float32), mask=of_block)
    if FIRST:
        squares = tl.zeros((16,), dtype=tl.float64)
        for begin in range(first, last, 16):
            inside = begin + many < last
            squares += tl.load(sums + (begin + many) * 3, mask=inside, other=0.0).to(tl.float64)
        tl.store(z_at + width * width, tl.sum(squares, axis=0).to(tl.float32))


@triton.jit
def _piece(
    piece,
    units,
    strips,
    pointers,
    hypers,
    left,
    lines,
    grams,
    of_units,
    of_strips,
    counters,
    z,
    FIRST: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDEST: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    if tl.load(piece + 5) < 0:
        _gram(piece, units, left, grams, of_units, z, FIRST, BLOCK, WIDEST)
    else:
        total = _strip(
            piece, strips, pointers, hypers, left, lines, z, OPERAND, BLOCK, ROWS, COLS,
            STATE, OF_M, OF_V,
        )  # fmt: skip
        _columns(piece, total, of_strips, counters, z, BLOCK, COLS)


@triton.jit(do_not_specialize=["begin", "matrices"])
def collect(
    pieces,
    begin,
    units,
    strips,
    pointers,
    hypers,
    masks,
    left,
    lines,
    grams,
    of_units,
    of_strips,
    counters,
    z,
    matrices,
    FIRST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS_W: tl.constexpr,
    BLOCK_U: tl.constexpr,
    ROWS_U: tl.constexpr,
    COLS: tl.constexpr,
    STATE: tl.constexpr,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """A piece of Z, or YᵀY and Σ u², of one matrix: this rank's part."""
    piece = pieces + (begin + tl.program_id(0)) * PIECE_SIZE
    operand, matrix = tl.load(piece), tl.load(piece + 1)
    masks += matrix
    WIDEST: tl.constexpr = BLOCK_U if BLOCK_U > BLOCK_W else BLOCK_W
    if tl.load(masks + matrices * (operand + MAKING)) != 0:
        if operand == 0:
            _piece(
                piece, units, strips, pointers, hypers, left, lines, grams, of_units, of_strips,
                counters, z, False, 0, BLOCK_W, ROWS_W, COLS, WIDEST, STATE, OF_M, OF_V,
            )  # fmt: skip
        else:
            _piece(
                piece, units, strips, pointers, hypers, left, lines, grams, of_units, of_strips,
                counters, z, FIRST, 1, BLOCK_U, ROWS_U, COLS, WIDEST, STATE, OF_M, OF_V,
            )  # fmt: skip
