"""What is a matrix: a parameter of any shape as a 2-D grid of rectangles, pieces of matrices.

A matrix's σ₁ does not depend on the order of its rows or columns, so a piece may be put at any
place that no other piece takes; only which elements share a row and which a column has to be right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ..spectral.tiles import Block

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding(NamedTuple):
    """Tensor parallelism of one parameter: every rank of ``group`` has a band of it."""

    group: ProcessGroup
    dim: int | None  # that is cut into bands; None: every rank has the whole parameter
    sizes: tuple[int, ...]  # the local extent along ``dim`` on every rank of the group
    rank: int

    @property
    def is_repeated(self) -> bool:
        """True of all replicas but the first: what they hold counts once."""
        return self.dim is None and self.rank > 0


class Piece(NamedTuple):
    """Consecutive rows (columns) of a local weight that are consecutive in one of its matrices."""

    part: int
    begin: int  # where they lie in the local weight
    size: int
    at: int  # where they lie in the matrix


class Fused(NamedTuple):
    """Several matrices in one weight, side by side or interleaved along ``axis``."""

    axis: int
    sizes: tuple[int, ...]  # of the matrices
    labels: tuple[str, ...]
    pieces: tuple[Piece, ...]  # of the local weight, in order
    # Whether the pieces are those of this rank's band, where tensor parallelism cuts ``axis``.
    is_band: bool = False


def stacked(axis: int, sizes: Sequence[int], labels: Sequence[str]) -> Fused:
    """Return the split of a whole weight into parts that lie one after the other."""
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    pieces = [
        Piece(part, begin, size, 0)
        for part, (begin, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return Fused(axis, tuple(sizes), tuple(labels), tuple(pieces))


def interleaved(
    pattern: Sequence[int], labels: Sequence[str], rows: int, start: int, stop: int
) -> Fused:
    """Return the split of rows ``[start, stop)`` of a weight in which ``pattern`` repeats.

    Args:
        pattern: consecutive rows of each part in one period, as [q of a group, its k, its v].
        labels: of each part.
        rows: of the whole weight, a multiple of the period.
        start, stop: the band that this rank holds; may begin and end anywhere in the pattern.
    """
    period = max(1, sum(pattern))  # of a weight without columns it is 0
    pieces = []
    for repeat in range(start // period, -(-stop // period)):
        begin = repeat * period
        for part, size in enumerate(pattern):
            first, last = max(begin, start), min(begin + size, stop)
            if first < last:
                at = repeat * size + first - begin
                pieces.append(Piece(part, first - start, last - first, at))
            begin += size
    sizes = tuple(size * (rows // period) for size in pattern)
    return Fused(0, sizes, tuple(labels), tuple(pieces), is_band=True)


class MatrixShape(NamedTuple):
    suffix: str  # what the matrix's name adds to the parameter's
    rows: int
    cols: int


class Grid(NamedTuple):
    width: int  # columns of the local grid
    blocks: tuple[Block, ...]
    matrices: tuple[MatrixShape, ...]


class Kind(NamedTuple):
    """What a parameter is to the module that owns it, or to the user who says so.

    The matrix of a grouped convolution is block-diagonal. Its ``groups`` are matrices of their own,
    bands of the first dimension: outputs in ``nn.ConvNd``, inputs in ``nn.ConvTransposeNd``.
    """

    # "vector" (scheduled rate), "matrix", "convolution" (rows: the first dimension) or "experts"
    form: str
    groups: int = 1
    # Labels of what it stacks along ``axis`` of each matrix, all of one size.
    parts: tuple[str, ...] = ()
    axis: int = 0
    role: str | None = None  # "embedding", "head" or "adapter"
    partner: str | None = None  # the other factor of an adapter's product, by its parameter's name


def guessed_form(shape: Sequence[int]) -> str:
    """Return what a weight of three dimensions or more is taken for by its shape alone.

    A convolution has more filters than taps, (out, in/groups, taps), a depthwise one has a single
    input per filter; a stack has no more experts than each has columns, (experts, m, n). What has
    more than three dimensions is a convolution.
    """
    is_stack = len(shape) == 3 and shape[0] <= shape[2] and (shape[1] > 1 or shape[0] == 1)
    return "experts" if is_stack else "convolution"


#: Stacked fused weights that are split without an override, by name: the label of each part, all
#: parts of one size. Weights that interleave their parts per head (BLOOM, GPT-NeoX) are not stacked
#: and are left whole.
KNOWN_FUSED: Mapping[str, tuple[str, ...]] = {
    "*c_attn.weight": ("q", "k", "v"),  # GPT-2 (Hugging Face, nanoGPT)
    "*in_proj_weight": ("q", "k", "v"),  # torch.nn.MultiheadAttention
    "*.qkv.weight": ("q", "k", "v"),  # timm, Swin, DINO
    "*.gate_up_proj.weight": ("gate", "up"),  # Phi-3, GLM
}

#: What torch's parametrizations, the older weight_norm and pruning make of a weight's name, but for
#: weight_norm's lengths, and what PEFT adds to the path of a layer.
_REWRITTEN = re.compile(
    r"(^|\.)parametrizations\.(\w+)\.original1?$|(?<=weight)_(?:orig|v)$"
    r"|\.base_layer(?=\.)|\.modules_to_save\.\w+(?=\.)"
)


def plain_name(name: str) -> str:
    """Return the name that a weight has without parametrizations, weight_norm, pruning and PEFT."""
    return _REWRITTEN.sub(lambda match: (match[1] or "") + (match[2] or ""), name)


def known_fused(name: str, shape: Sequence[int]) -> Fused | None:
    """Return how the weight of a well-known name is fused; None where name or shape do not say."""
    name = plain_name(name)
    for pattern, labels in KNOWN_FUSED.items():
        if len(shape) == 2 and fnmatchcase(name, pattern):
            parts = len(labels)
            if parts == 3 and shape[0] == 3 * shape[1]:
                return stacked(0, (shape[1],) * 3, labels)
            if parts == 3 and shape[1] == 3 * shape[0]:  # Hugging Face's Conv1D keeps (in, out)
                return stacked(1, (shape[0],) * 3, labels)
            if parts == 2 and shape[0] % 2 == 0:
                return stacked(0, (shape[0] // 2,) * 2, labels)
    return None


def stacked_parts(kind: Kind, shape: Sequence[int]) -> Fused | None:
    """Return the split of a whole weight whose kind says that it stacks parts; else None."""
    dim = kind.axis + (len(shape) - 2 if kind.form == "experts" else 0)
    parts = len(kind.parts)
    if not parts or shape[dim] % parts:
        return None
    return stacked(kind.axis, (shape[dim] // parts,) * parts, kind.parts)


def looks_fused(shape: Sequence[int]) -> bool:
    """Whether a weight without a name may stack q, k and v: one side is three times the other."""
    return len(shape) == 2 and min(shape) > 1 and max(shape) == 3 * min(shape)


def explicit_fused(
    name: str,
    shape: Sequence[int],
    option: Any,
    kind: Kind | None = None,
    order: Sequence[int] | None = None,
) -> Fused:
    """Return the split that an override asks for: a number of equal parts, or their sizes.

    Of experts (experts, m, n) that is an axis of each expert's matrix, of a convolution its first
    dimension or its second. ``kind`` and ``order`` are those of :func:`grid_of`.

    Raises:
        ValueError: no axis of ``shape`` divides as asked.
    """
    is_stack = _form(shape, kind) == "experts"
    dims = [] if len(shape) < 2 else [len(shape) - 2, len(shape) - 1] if is_stack else [0, 1]
    if isinstance(option, int):
        axis = next((axis for axis, dim in enumerate(dims) if shape[dim] % option == 0), None)
        sizes = () if axis is None else (shape[dims[axis]] // option,) * option
    else:
        sizes = tuple(int(size) for size in option)
        axis = next((axis for axis, dim in enumerate(dims) if shape[dim] == sum(sizes)), None)
    if axis is None:
        raise ValueError(
            f"overrides: 'fused' of parameter '{name}' got {option!r}, but it takes a number of "
            f"parts that divides, or sizes that add up to, a dimension of its shape {tuple(shape)}."
        )
    labels = [str(part) for part in range(len(sizes))]
    if axis == 0 or is_stack:
        return stacked(axis, sizes, labels)
    # Columns are numbered as they lie in memory: each element of the dimension has all that lies
    # inside it.
    columns = [dim for dim in order or range(len(shape)) if dim > 0]
    inner = prod(shape[dim] for dim in columns[columns.index(1) + 1 :])
    total = prod(shape[1:])
    split = interleaved([size * inner for size in sizes], labels, total, 0, total)
    return split._replace(axis=1, is_band=False)


def grid_of(
    shape: Sequence[int],
    *,
    sharding: Sharding | None = None,
    fused: Fused | None = None,
    kind: Kind | None = None,
    order: Sequence[int] | None = None,
) -> Grid:
    """Return how the elements of a parameter, as they lie in memory, make up matrices.

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
        shape: of the weight on this rank.
        sharding: its tensor parallelism.
        fused: the parts of each of its matrices; a convolution's groups are not looked at then.
        kind: what it is; None: see :func:`guessed_form`.
        order: its dimensions as they lie in memory, the slowest first; None: in order.

    Raises:
        ValueError: tensor parallelism of a parameter that is neither a vector nor a 2-D matrix.
    """
    if sharding is not None and sharding.dim is None:
        sharding = None
    if len(shape) > 2 and sharding is not None:
        raise ValueError(f"a tensor-parallel parameter of shape {tuple(shape)} is not understood")
    band = None if sharding is None else sharding.dim  # the axis that ranks share out
    if sharding is not None and len(shape) == 1:
        band = 1
    if fused is not None and band == fused.axis and not fused.is_band:
        fused = None  # a stack that tensor parallelism cuts along itself is kept whole
    form = _form(shape, kind)
    groups = 1 if kind is None or fused is not None else kind.groups
    axes = _axes(shape, form, groups)
    lying = [axis for dim in order or range(len(shape)) for axis in axes[dim]]
    if lying[-1].label == "row":  # it is the transposed matrix that lies row by row
        lying = [axis._replace(label=_TRANSPOSED[axis.label]) for axis in lying]
        band = None if band is None else 1 - band
        fused = None if fused is None else fused._replace(axis=1 - fused.axis)
    width, blocks = _rectangles(lying)
    size = {
        label: prod(axis.size for axis in lying if axis.label == label) for label in _TRANSPOSED
    }
    if fused is not None:
        blocks = [piece for block in blocks for piece in _parted(block, fused)]
    if sharding is not None and (fused is None or band != fused.axis):
        size["row" if band == 0 else "col"] = sum(sharding.sizes)
        at = sum(sharding.sizes[: sharding.rank])
        row, col = (at, 0) if band == 0 else (0, at)
        blocks = [block._replace(row=block.row + row, col=block.col + col) for block in blocks]
    suffixes = [""]
    if form == "experts" or groups > 1:
        suffixes = [f"[{number}]" for number in range(size["stack"])]
    matrices = [MatrixShape(suffix, size["row"], size["col"]) for suffix in suffixes]
    if fused is not None:
        matrices = [part for matrix in matrices for part in _part_shapes(matrix, fused)]
    return Grid(width, tuple(blocks), tuple(matrices))


class _Axis(NamedTuple):
    label: str  # "stack" of matrices, "row" or "col"
    size: int
    stride: int  # how many matrices, rows or columns on the next place along it is


_TRANSPOSED = {"stack": "stack", "row": "col", "col": "row"}


def _form(shape: Sequence[int], kind: Kind | None) -> str:
    if len(shape) < 3:
        return "matrix"
    return guessed_form(shape) if kind is None or kind.form == "vector" else kind.form


def _axes(shape: Sequence[int], form: str, groups: int) -> list[list[_Axis]]:
    """Return what each dimension is; :func:`_rectangles` finds the strides of rows and columns."""
    if form == "experts":
        stack = shape[:-2]
        dims = [[_Axis("stack", size, prod(stack[dim + 1 :]))] for dim, size in enumerate(stack)]
        return [*dims, [_Axis("row", shape[-2], 0)], [_Axis("col", shape[-1], 0)]]
    columns = [[_Axis("col", size, 0)] for size in (shape if len(shape) == 1 else shape[1:])]
    if len(shape) == 1:
        return columns
    return [[_Axis("stack", groups, 1), _Axis("row", shape[0] // groups, 0)], *columns]


def _rectangles(axes: Sequence[_Axis]) -> tuple[int, list[Block]]:
    """Return the width of the grid of ``axes``, and the rectangles in it that are in one matrix.

    A matrix is one rectangle where its columns are the innermost axes and its rows the next. In
    memory of another order, it is one for each place along what lies before and between them.

    Args:
        axes: the slowest first.
    """
    strides = {"row": 1, "col": 1}
    numbered: list[_Axis] = []
    for axis in reversed(axes):
        if axis.label != "stack":
            axis = axis._replace(stride=strides[axis.label])
            strides[axis.label] *= axis.size
        if axis.size != 1:
            numbered.insert(0, axis)
    rows_at = [number for number, axis in enumerate(numbered) if axis.label == "row"]
    start = stop = rows_at[-1] + 1 if rows_at else 0
    while start and numbered[start - 1].label == "row":
        start -= 1
    end = len(numbered)
    while end > stop and numbered[end - 1].label == "col":
        end -= 1
    rows, cols = (prod(axis.size for axis in run) for run in (numbered[start:stop], numbered[end:]))
    blocks = []
    for line, above in enumerate(_places(numbered[:start])):
        for column, beside in enumerate(_places(numbered[stop:end])):
            matrix, row, col = (a + b for a, b in zip(above, beside, strict=True))
            blocks.append(Block(matrix, line * rows, column * cols, rows, cols, row, col))
    return prod(axis.size for axis in numbered[stop:]), blocks


def _places(axes: Sequence[_Axis]) -> Iterator[tuple[int, int, int]]:
    """Yield (matrix, row, column) of every place along ``axes``, in the order of memory."""
    for place in product(*(range(axis.size) for axis in axes)):
        at = {"stack": 0, "row": 0, "col": 0}
        for index, axis in zip(place, axes, strict=True):
            at[axis.label] += index * axis.stride
        yield at["stack"], at["row"], at["col"]


def _parted(block: Block, fused: Fused) -> Iterator[Block]:
    """Yield the pieces of a rectangle that lie in each part."""
    first, extent = (block.row, block.rows) if fused.axis == 0 else (block.col, block.cols)
    for part, begin, length, at in fused.pieces:
        low, high = max(first, begin), min(first + extent, begin + length)
        if low < high:
            matrix = block.matrix * len(fused.labels) + part
            past, size, there = low - first, high - low, at + low - begin
            if fused.axis == 0:
                place = {"grid_row": block.grid_row + past, "rows": size, "row": there}
            else:
                place = {"grid_col": block.grid_col + past, "cols": size, "col": there}
            yield block._replace(matrix=matrix, **place)


def _part_shapes(matrix: MatrixShape, fused: Fused) -> Iterator[MatrixShape]:
    for label, length in zip(fused.labels, fused.sizes, strict=True):
        rows, cols = (length, matrix.cols) if fused.axis == 0 else (matrix.rows, length)
        yield MatrixShape(f"{matrix.suffix}[{label}]", rows, cols)
