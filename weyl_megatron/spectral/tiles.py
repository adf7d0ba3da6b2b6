"""Tiles: the one way in which a piece of a matrix is described, whatever engine holds it.

A rank holds an arbitrary range of a flattened matrix (ZeRO), a band of its rows or columns (tensor
parallelism), or several matrices interleaved in one weight (fused QKV). Each of these is a short
list of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """A rectangle of a parameter's 2-D grid and the place in a matrix that it is."""

    matrix: int  # which matrix the rectangle belongs to
    grid_row: int  # where it lies in the parameter's grid
    grid_col: int
    rows: int
    cols: int
    row: int  # where it lies in the matrix
    col: int


class Tile(NamedTuple):
    """A dense rectangle ``matrix[row:row+rows, col:col+cols]`` stored row-major in a local buffer.

    Row ``i`` of the rectangle starts at element ``offset + i * stride`` of buffer number
    ``buffer``.
    """

    matrix: int
    row: int
    col: int
    rows: int
    cols: int
    offset: int
    stride: int
    buffer: int = 0


def range_rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(row, col, rows, cols)``: the at most three rectangles that cover ``[start, stop)``
    of a flattened grid.

    ``width`` is the number of columns of the grid. They are part of a row, whole rows, part of a
    row, in this order.
    """
    while start < stop:
        row, col = divmod(start, width)
        if col == 0 and stop - start >= width:
            rows, cols = (stop - start) // width, width
        else:
            rows, cols = 1, min(width - col, stop - start)
        yield row, col, rows, cols
        start += rows * cols


def tiles_of_range(
    blocks: Sequence[Block], width: int, start: int, stop: int, offset: int, buffer: int = 0
) -> Iterator[Tile]:
    """Yield the tiles of elements ``[start, stop)`` of a parameter's flattened grid, stored from
    ``offset`` on.

    Args:
        blocks: disjoint rectangles of the grid, each a piece of some matrix. Cells in no block
            yield no tile.
        width: columns of the grid.
        start, stop: the range of elements that the buffer holds.
        offset: where in the buffer element ``start`` lies.
        buffer: the number of the buffer, copied into each tile.
    """
    for row, col, rows, cols in range_rectangles(start, stop, width):
        for block in blocks:
            top, bottom = max(row, block.grid_row), min(row + rows, block.grid_row + block.rows)
            left, right = max(col, block.grid_col), min(col + cols, block.grid_col + block.cols)
            if top < bottom and left < right:
                yield Tile(
                    matrix=block.matrix,
                    row=block.row + top - block.grid_row,
                    col=block.col + left - block.grid_col,
                    rows=bottom - top,
                    cols=right - left,
                    offset=offset + top * width + left - start,
                    stride=width,
                    buffer=buffer,
                )
