"""What is a matrix: a parameter of any shape as a 2-D grid of rectangles, pieces of matrices.

A matrix's σ₁ does not depend on the order of its rows or columns, so a piece may be put at any
place that no other piece takes; only which elements share a row and which a column has to be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from ..spectral.tiles import Block
from .fused import Fused, MatrixShape, part_shapes, parted
from .kinds import Kind, form_of


class Box(NamedTuple):
    """The part of a parameter that a rank has: a range in every dimension."""

    starts: tuple[int, ...]
    extents: tuple[int, ...]


class Grid(NamedTuple):
    width: int  # columns of the grid of this rank's box
    blocks: tuple[Block, ...]
    matrices: tuple[MatrixShape, ...]


def grid_of(
    shape: Sequence[int],
    *,
    box: Box | None = None,
    fused: Fused | None = None,
    kind: Kind | None = None,
    order: Sequence[int] | None = None,
) -> Grid:
    """Return how the elements that a rank has of a parameter, as they lie in memory, make up
    matrices.

    ==============================  ====================================================
    shape                           matrices
    ==============================  ====================================================
    ``(n,)``                        one ``(1, n)``
    ``(m, n)``                      one
    ``(experts, m, n)``             one ``(m, n)`` per expert
    ``(out, in/groups, *kernel)``   one ``(out/groups, in/groups·kernel)`` per group
    ==============================  ====================================================

    Where ``fused`` each of these is one per part.

    Args:
        shape: of the whole weight.
        box: what this rank has of it; None: all.
        fused: the parts of each of its matrices; a convolution's groups are not looked at then.
        kind: what it is; None: see :func:`.kinds.guessed_form`.
        order: its dimensions as they lie in memory, the slowest first; None: in order.
    """
    form = form_of(shape, kind)
    groups = 1 if kind is None or fused is not None else kind.groups
    axes = _axes(shape, form, groups, box or Box((0,) * len(shape), tuple(shape)))
    lying = [axis for dim in order or range(len(shape)) for axis in axes[dim]]
    if lying[-1].label == "row":  # it is the transposed matrix that lies row by row
        lying = [axis._replace(label=_TRANSPOSED[axis.label]) for axis in lying]
        fused = None if fused is None else fused._replace(axis=1 - fused.axis)
    width, blocks = _rectangles(lying)
    size = {
        label: prod(axis.size for axis in lying if axis.label == label) for label in _TRANSPOSED
    }
    if fused is not None:
        blocks = [piece for block in blocks for piece in parted(block, fused)]
    suffixes = [""]
    if form == "experts" or groups > 1:
        suffixes = [f"[{number}]" for number in range(size["stack"])]
    matrices = [MatrixShape(suffix, size["row"], size["col"]) for suffix in suffixes]
    if fused is not None:
        matrices = [part for matrix in matrices for part in part_shapes(matrix, fused)]
    return Grid(width, tuple(blocks), tuple(matrices))


class _Axis(NamedTuple):
    label: str  # "stack" of matrices, "row" or "col"; "stack row": rows of one after the other
    size: int  # of the whole weight
    first: int  # where this rank's range begins
    extent: int  # of the range
    # How many matrices, rows or columns on the next place along it is; "stack row": rows of each.
    stride: int = 0

    def place(self, index: int) -> tuple[int, int, int]:
        """Return what a place along it adds to the numbers of matrix, row and column."""
        at = self.first + index
        if self.label.startswith("stack "):
            matrix, line = divmod(at, self.stride)
            return (matrix, line, 0) if self.label == "stack row" else (matrix, 0, line)
        at *= self.stride
        return (
            at if self.label == "stack" else 0,
            at if self.label == "row" else 0,
            at if self.label == "col" else 0,
        )


_TRANSPOSED = {
    "stack": "stack",
    "row": "col",
    "col": "row",
    "stack row": "stack col",
    "stack col": "stack row",
}


def _axes(shape: Sequence[int], form: str, groups: int, box: Box) -> list[list[_Axis]]:
    """Return what each dimension is; :func:`_rectangles` finds the strides of rows and columns.

    A dimension is one axis, but for the outputs of a grouped convolution: these are groups, and in
    each rows.
    """
    ranges = list(zip(shape, *box, strict=True))
    if form == "experts":
        stack = shape[:-2]
        dims = [
            [_Axis("stack", *each, prod(stack[dim + 1 :]))] for dim, each in enumerate(ranges[:-2])
        ]
        return [*dims, [_Axis("row", *ranges[-2])], [_Axis("col", *ranges[-1])]]
    columns = [[_Axis("col", *each)] for each in (ranges if len(shape) == 1 else ranges[1:])]
    if len(shape) == 1:
        return columns
    return [_outputs(*ranges[0], groups), *columns]


def _outputs(size: int, first: int, extent: int, groups: int) -> list[_Axis]:
    """Return the axes of a dimension of ``size`` outputs in ``groups``, of which this rank has a
    range.
    """
    if groups == 1:
        return [_Axis("row", size, first, extent)]
    rows = size // groups
    if first % rows == 0 and extent % rows == 0:
        return [
            _Axis("stack", groups, first // rows, extent // rows, 1),
            _Axis("row", rows, 0, rows),
        ]
    # A group is cut: each of its outputs is taken by itself.
    return [
        _Axis("stack", groups, 0, 1, 1),
        _Axis("stack row", size, first, extent, rows),
        _Axis("row", rows, 0, 1),
    ]


def _rectangles(axes: Sequence[_Axis]) -> tuple[int, list[Block]]:
    """Return the width of the grid of ``axes``, and the rectangles in it that are in one matrix.

    A matrix is one rectangle where its columns are the innermost axes and its rows the next. In
    memory of another order, or where an inner axis is cut, it is one for each place along the
    others.

    Args:
        axes: the slowest first.
    """
    strides = {"row": 1, "col": 1}
    numbered: list[_Axis] = []
    fixed: list[_Axis] = []  # of one place
    for axis in reversed(axes):
        if axis.label in strides:
            axis = axis._replace(stride=strides[axis.label])
            strides[axis.label] *= axis.size
        if axis.extent == 1:
            fixed.append(axis)
        else:
            numbered.insert(0, axis)
    rows_at = [number for number, axis in enumerate(numbered) if axis.label == "row"]
    stop = rows_at[-1] + 1 if rows_at else 0
    start, rows = _run(numbered, stop, 0, "row")
    if start == stop:
        start = stop = 0
    end, cols = _run(numbered, len(numbered), stop, "col")
    origin = _total(axis.place(0) for axis in (*fixed, *numbered[start:stop], *numbered[end:]))
    blocks = []
    for line, above in enumerate(_places(numbered[:start])):
        for column, beside in enumerate(_places(numbered[stop:end])):
            matrix, row, col = _total((origin, above, beside))
            blocks.append(Block(matrix, line * rows, column * cols, rows, cols, row, col))
    return prod(axis.extent for axis in numbered[stop:]), blocks


def _run(axes: Sequence[_Axis], stop: int, least: int, label: str) -> tuple[int, int]:
    """Return from where on the axes before ``stop`` are consecutive rows, or columns, and how
    many.
    """
    start, length = stop, 1
    while start > least and axes[start - 1].label == label and axes[start - 1].stride == length:
        start -= 1
        length *= axes[start].extent
    return start, length


def _total(places: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Return the sums of matrices, rows and columns."""
    matrix, row, col = map(sum, zip((0, 0, 0), *places, strict=True))
    return matrix, row, col


def _places(axes: Sequence[_Axis]) -> Iterator[tuple[int, int, int]]:
    """Yield (matrix, row, column) of every place along ``axes``, in the order of memory."""
    for place in product(*(range(axis.extent) for axis in axes)):
        yield _total(axis.place(index) for index, axis in zip(place, axes, strict=True))
