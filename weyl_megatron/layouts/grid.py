"""What is a matrix: a parameter of any shape as a 2-D grid whose rectangles are pieces of matrices.

A matrix's σ₁ does not depend on the order of its rows or columns, so a piece may be put at any place that no other
piece takes; only which elements share a row and which a column has to be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from weyl_megatron.spectral.tiles import Block

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding(NamedTuple):
    """Tensor parallelism of one parameter: every rank of ``group`` has a band of ``dim``, or all where it is None."""

    group: ProcessGroup
    dim: int | None
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
    is_band: bool = False  # whether the pieces are those of this rank's band, where tensor parallelism cuts ``axis``


def stacked(axis: int, sizes: Sequence[int], labels: Sequence[str]) -> Fused:
    """Return the split of a whole weight into parts that lie one after the other."""
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    pieces = [Piece(part, begin, size, 0) for part, (begin, size) in enumerate(zip(starts, sizes, strict=True))]
    return Fused(axis, tuple(sizes), tuple(labels), tuple(pieces))


def interleaved(pattern: Sequence[int], labels: Sequence[str], rows: int, start: int, stop: int) -> Fused:
    """Return the split of rows ``[start, stop)`` of a weight of ``rows`` rows in which ``pattern`` repeats.

    Args:
        pattern: consecutive rows of each part in one period, as [q of a group, its k, its v].
        labels: of each part.
        rows: of the whole weight, a multiple of the period.
        start, stop: the band that this rank holds; may begin and end anywhere in the pattern.
    """
    period = sum(pattern)
    pieces = []
    for repeat in range(start // period, -(-stop // period)):
        begin = repeat * period
        for part, size in enumerate(pattern):
            first, last = max(begin, start), min(begin + size, stop)
            if first < last:
                pieces.append(Piece(part, first - start, last - first, repeat * size + first - begin))
            begin += size
    return Fused(0, tuple(size * (rows // period) for size in pattern), tuple(labels), tuple(pieces), is_band=True)


class MatrixShape(NamedTuple):
    suffix: str  # what the matrix's name adds to the parameter's
    rows: int
    cols: int


class Grid(NamedTuple):
    width: int  # columns of the local grid
    blocks: tuple[Block, ...]
    matrices: tuple[MatrixShape, ...]


#: Stacked fused weights that are split without being told, by name: the label of each part, all parts of one size.
#: Weights that interleave their parts per head (BLOOM, GPT-NeoX) are not stacked and are left whole.
KNOWN_FUSED: Mapping[str, tuple[str, ...]] = {
    "*c_attn.weight": ("q", "k", "v"),  # GPT-2 (Hugging Face, nanoGPT)
    "*in_proj_weight": ("q", "k", "v"),  # torch.nn.MultiheadAttention
    "*.qkv.weight": ("q", "k", "v"),  # timm, Swin, DINO
    "*.gate_up_proj.weight": ("gate", "up"),  # Phi-3, GLM
}


def known_fused(name: str, shape: Sequence[int]) -> Fused | None:
    """Return how the weight of a well-known name is fused, or None where name or shape do not say so."""
    name = name.replace(".parametrizations.weight.original", ".weight")  # torch's parametrizations, σReparam among them
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


def told_fused(name: str, shape: Sequence[int], option: Any) -> Fused:
    """Return the split that an override asks for: a number of equal parts, or their sizes along one axis.

    Raises:
        ValueError: no axis of ``shape`` divides as asked.
    """
    if isinstance(option, int):
        axis = next((axis for axis in range(2) if len(shape) == 2 and shape[axis] % option == 0), None)
        sizes = () if axis is None else (shape[axis] // option,) * option
    else:
        sizes = tuple(int(size) for size in option)
        axis = next((axis for axis in range(2) if len(shape) == 2 and shape[axis] == sum(sizes)), None)
    if axis is None:
        raise ValueError(
            f"overrides: 'fused' of parameter '{name}' got {option!r}, but it takes a number of parts that divides, "
            f"or sizes that add up to, a dimension of its shape {tuple(shape)}."
        )
    return stacked(axis, sizes, [str(part) for part in range(len(sizes))])


def grid_of(shape: Sequence[int], *, sharding: Sharding | None = None, fused: Fused | None = None) -> Grid:
    """Return the grid of a parameter of local ``shape``: how its elements, row-major, make up matrices.

    ========================  =======================================================
    shape                     matrices
    ========================  =======================================================
    ``(n,)``                  one ``(1, n)``
    ``(m, n)``                one, or one per part where ``fused``
    ``(experts, m, n)``       one ``(m, n)`` per expert
    ``(out, in, *kernel)``    one ``(out, in·kernel)`` (convolutions, 4 dimensions or more)
    ========================  =======================================================

    Raises:
        ValueError: tensor parallelism of a parameter that is neither a vector nor a 2-D matrix.
    """
    if sharding is not None and sharding.dim is None:
        sharding = None
    if len(shape) == 3:
        if sharding is not None:
            raise ValueError(f"a tensor-parallel parameter of shape {tuple(shape)} is not understood")
        experts, rows, cols = shape
        blocks = tuple(Block(e, e * rows, 0, rows, cols, 0, 0) for e in range(experts))
        return Grid(cols, blocks, tuple(MatrixShape(f"[{e}]", rows, cols) for e in range(experts)))
    if len(shape) > 3 and sharding is not None:
        raise ValueError(f"a tensor-parallel parameter of shape {tuple(shape)} is not understood")
    rows, cols = (1, shape[0]) if len(shape) == 1 else (shape[0], prod(shape[1:]))
    axis = None if sharding is None else (1 if len(shape) == 1 else sharding.dim)
    if fused is not None and (fused.is_band or axis != fused.axis):
        return _fused_grid(rows, cols, fused, sharding)
    full, at = _spread(sharding)
    if axis == 0:
        return Grid(cols, (Block(0, 0, 0, rows, cols, at, 0),), (MatrixShape("", full, cols),))
    if axis == 1:
        return Grid(cols, (Block(0, 0, 0, rows, cols, 0, at),), (MatrixShape("", rows, full),))
    return Grid(cols, (Block(0, 0, 0, rows, cols, 0, 0),), (MatrixShape("", rows, cols),))


def _fused_grid(rows: int, cols: int, fused: Fused, sharding: Sharding | None) -> Grid:
    """The grid of several matrices along ``fused.axis``, whose other axis may be sharded."""
    full, at = (0, 0) if fused.is_band else _spread(sharding)
    if fused.axis == 0:
        blocks = [Block(part, begin, 0, size, cols, there, at) for part, begin, size, there in fused.pieces]
        shapes = [(size, full or cols) for size in fused.sizes]
    else:
        blocks = [Block(part, 0, begin, rows, size, at, there) for part, begin, size, there in fused.pieces]
        shapes = [(full or rows, size) for size in fused.sizes]
    named = zip(fused.labels, shapes, strict=True)
    return Grid(cols, tuple(blocks), tuple(MatrixShape(f"[{label}]", *shape) for label, shape in named))


def _spread(sharding: Sharding | None) -> tuple[int, int]:
    """Return (full extent, where this rank's band begins) along the sharded dimension; zeros where there is none."""
    return (0, 0) if sharding is None else (sum(sharding.sizes), sum(sharding.sizes[: sharding.rank]))
