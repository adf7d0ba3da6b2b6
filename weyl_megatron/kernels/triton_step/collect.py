"""What the units have summed, added up in their order; and Z of rows that are cut between ranks."""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw import address, elements
from .numbers import MAKING
from .tables import HYPER_SIZE, PIECE_SIZE, UNIT_SIZE


@triton.jit
def _columns(
    piece,
    units,
    pointers,
    hypers,
    left,
    partial,
    z,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY: tl.constexpr,
    COLS: tl.constexpr,
    STATE: tl.constexpr,
):
    """Columns of Z from ``start`` on; MANY units, or rows, at a time."""
    n, width, start = tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5)
    place, count, apart = tl.load(piece + 6), tl.load(piece + 7), tl.load(piece + 8)
    many, vectors, col = tl.arange(0, MANY), tl.arange(0, BLOCK), start + tl.arange(0, COLS)
    of_block = vectors < width
    in_z = of_block[:, None] & (col < n)[None, :]
    at = vectors[:, None] * n + col[None, :]
    acc = tl.zeros((MANY, BLOCK, COLS), dtype=tl.float32)
    for begin in range(0, count, MANY):
        there = begin + many
        inside = (there < count)[:, None, None] & in_z[None, :, :]
        acc += tl.load(
            partial + place + (there * apart)[:, None, None] + at[None, :, :],
            mask=inside,
            other=0.0,
        )
    for number in range(tl.load(piece + 11), tl.load(piece + 10)):
        unit = units + number * UNIT_SIZE
        buffer, offset, rows = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
        cols, stride, slot = tl.load(unit + 3), tl.load(unit + 4), tl.load(unit + 12)
        hyper = hypers + buffer * HYPER_SIZE
        of_root, of_one = tl.load(hyper + 3), tl.load(hyper + 4)
        base = address(pointers, buffer, 0, offset, STATE, 0)
        first = address(pointers, buffer, 2, offset, STATE, 0)
        second = address(pointers, buffer, 3, offset, STATE, 0)
        is_there = (OPERAND == 0) | (tl.load(pointers + buffer * 4 + 2) != 0)
        # In the unit's own columns, the first of which is the matrix's so-manieth.
        own = col - tl.load(unit + 11)
        in_cols = (own >= 0) & (own < cols) & is_there
        for begin in range(0, rows, MANY):
            row = begin + many
            inside = (row < rows)[:, None] & in_cols[None, :]
            at_row = row[:, None] * stride + own[None, :]
            a = elements(base, first, second, at_row, inside, of_root, of_one, OPERAND)
            in_y = (row < rows)[:, None] & of_block[None, :]
            y_at = left + slot + row[:, None] * width + vectors[None, :]
            y = tl.load(y_at, mask=in_y, other=0.0)
            acc += y[:, :, None] * a[:, None, :]
    tl.store(z + tl.load(piece + 2) + at, tl.sum(acc, axis=0), mask=in_z)


@triton.jit
def _gram(piece, units, left, partial, sums, z, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """YᵀY, and in a FIRST iteration Σ u² behind it."""
    n, width = tl.load(piece + 3), tl.load(piece + 4)
    place, count, apart = tl.load(piece + 6), tl.load(piece + 7), tl.load(piece + 8)
    first, last = tl.load(piece + 9), tl.load(piece + 10)
    many, vectors = tl.arange(0, 16), tl.arange(0, BLOCK)
    of_block = vectors < width
    z_at = z + tl.load(piece + 2) + width * n
    for j in range(0, width):
        gram = tl.zeros((16, BLOCK), dtype=tl.float64)
        for begin in range(0, count, 16):
            there = begin + many
            at = place + (there * apart)[:, None] + (width * n + j * width + vectors)[None, :]
            inside = (there < count)[:, None] & of_block[None, :]
            gram += tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
        for number in range(tl.load(piece + 11), last):
            unit = units + number * UNIT_SIZE
            rows, slot = tl.load(unit + 2), tl.load(unit + 12)
            if tl.load(unit + 11) == 0:  # just one piece of a row counts it
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
    pointers,
    hypers,
    left,
    partial,
    sums,
    z,
    FIRST: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
    STATE: tl.constexpr,
):
    if tl.load(piece + 5) < 0:
        _gram(piece, units, left, partial, sums, z, FIRST, BLOCK)
    else:
        MANY: tl.constexpr = 32 // BLOCK
        _columns(
            piece, units, pointers, hypers, left, partial, z, OPERAND, BLOCK, MANY, COLS, STATE
        )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "matrices"])
def collect(
    pieces,
    begin,
    units,
    pointers,
    hypers,
    masks,
    left,
    partial,
    sums,
    z,
    matrices,
    FIRST: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_U: tl.constexpr,
    COLS: tl.constexpr,
    STATE: tl.constexpr,
):
    """A piece of Z, or YᵀY and Σ u², of one matrix: this rank's part."""
    piece = pieces + (begin + tl.program_id(0)) * PIECE_SIZE
    operand, matrix = tl.load(piece), tl.load(piece + 1)
    masks += matrix
    if tl.load(masks + matrices * (operand + MAKING)) != 0:
        if operand == 0:
            _piece(
                piece, units, pointers, hypers, left, partial, sums, z,
                False, 0, BLOCK_W, COLS, STATE,
            )  # fmt: skip
        else:
            _piece(
                piece, units, pointers, hypers, left, partial, sums, z,
                FIRST, 1, BLOCK_U, COLS, STATE,
            )  # fmt: skip
