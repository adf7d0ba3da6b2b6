"""Weights that are several matrices: which rows or columns belong to which part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any, NamedTuple

from ..spectral.tiles import Block
from .kinds import Kind, form_of


class MatrixShape(NamedTuple):
    suffix: str  # what the matrix's name adds to the parameter's
    rows: int
    cols: int


class Piece(NamedTuple):
    """Consecutive rows (columns) of a weight that are consecutive in one of its matrices."""

    part: int
    begin: int  # where they lie in the weight
    size: int
    at: int  # where they lie in the matrix


class Fused(NamedTuple):
    """Several matrices in one weight, side by side or interleaved along ``axis``."""

    axis: int
    sizes: tuple[int, ...]  # of the matrices
    labels: tuple[str, ...]
    pieces: tuple[Piece, ...]  # of the whole weight, in order

    @property
    def repeats(self) -> bool:
        """Whether the parts come again and again, as per head."""
        return len(self.pieces) > len(self.sizes)


def stacked(axis: int, sizes: Sequence[int], labels: Sequence[str]) -> Fused:
    """Return the split of a whole weight into parts that lie one after the other."""
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    pieces = [
        Piece(part, begin, size, 0)
        for part, (begin, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return Fused(axis, tuple(sizes), tuple(labels), tuple(pieces))


def interleaved(pattern: Sequence[int], labels: Sequence[str], rows: int, axis: int = 0) -> Fused:
    """Return the split of a whole weight in which ``pattern`` repeats along ``axis``.

    Args:
        pattern: consecutive rows of each part in one period, as [q of a group, its k, its v].
        labels: of each part.
        rows: of the weight (columns, where ``axis`` is 1), a multiple of the period.
        axis: of the matrices.
    """
    period = max(1, sum(pattern))  # of a weight without columns it is 0
    pieces = []
    for repeat in range(rows // period):
        begin = repeat * period
        for part, size in enumerate(pattern):
            if size:
                pieces.append(Piece(part, begin, size, repeat * size))
            begin += size
    sizes = tuple(size * (rows // period) for size in pattern)
    return Fused(axis, sizes, tuple(labels), tuple(pieces))


def stacked_in_bands(fused: Fused, bands: Sequence[int]) -> Fused | None:
    """Return the split of a weight of which every rank stacks its shares of the parts; None where
    these cannot be shared out evenly.

    Parts that repeat are cut with what they repeat in, as heads are, and stay in order.

    Args:
        fused: the sizes of the parts, of the whole weight.
        bands: the extent of each rank along the axis of the parts.
    """
    ranks = len(bands)
    if fused.repeats and fused.axis == 0:
        return fused
    if len(set(bands)) > 1 or any(size % ranks for size in fused.sizes):
        return None
    pattern = [size // ranks for size in fused.sizes]
    return interleaved(pattern, fused.labels, sum(bands), fused.axis)


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
    if kind.period and parts:
        divides = shape[dim] % sum(kind.period) == 0
        return interleaved(kind.period, kind.parts, shape[dim], kind.axis) if divides else None
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
    is_stack = form_of(shape, kind) == "experts"
    dims = [] if len(shape) < 2 else [len(shape) - 2, len(shape) - 1] if is_stack else [0, 1]
    if isinstance(option, int):
        axis = next((axis for axis, dim in enumerate(dims) if shape[dim] % option == 0), None)
        sizes = () if axis is None else (shape[dims[axis]] // option,) * option
    else:
        sizes = tuple(int(size) for size in option)
        axis = next((axis for axis, dim in enumerate(dims) if shape[dim] == sum(sizes)), None)
    if axis is None:
        raise ValueError(
            f"AdamW2: overrides' 'fused' of parameter '{name}' got {option!r}, but it takes a "
            "number of parts that divides, or sizes that add up to, a dimension of its shape "
            f"{tuple(shape)}."
        )
    labels = [str(part) for part in range(len(sizes))]
    if axis == 0 or is_stack:
        return stacked(axis, sizes, labels)
    # Columns are numbered as they lie in memory: each element of the dimension has all that lies
    # inside it.
    columns = [dim for dim in order or range(len(shape)) if dim > 0]
    inner = prod(shape[dim] for dim in columns[columns.index(1) + 1 :])
    total = prod(shape[1:])
    return interleaved([size * inner for size in sizes], labels, total, axis=1)


def parted(block: Block, fused: Fused) -> Iterator[Block]:
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


def part_shapes(matrix: MatrixShape, fused: Fused) -> Iterator[MatrixShape]:
    """Yield what each part of a matrix is."""
    for label, length in zip(fused.labels, fused.sizes, strict=True):
        rows, cols = (length, matrix.cols) if fused.axis == 0 else (matrix.rows, length)
        yield MatrixShape(f"{matrix.suffix}[{label}]", rows, cols)
