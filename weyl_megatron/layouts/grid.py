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


class Fused(NamedTuple):
    """Several matrices side by side in one weight, along ``axis`` of the local shape."""

    axis: int
    sizes: tuple[int, ...]
    labels: tuple[str, ...]


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
    for pattern, labels in KNOWN_FUSED.items():
        if len(shape) == 2 and fnmatchcase(name, pattern):
            parts = len(labels)
            if parts == 3 and shape[0] == 3 * shape[1]:
                return Fused(0, (shape[1],) * 3, labels)
            if parts == 3 and shape[1] == 3 * shape[0]:  # Hugging Face's Conv1D keeps (in, out)
                return Fused(1, (shape[0],) * 3, labels)
            if parts == 2 and shape[0] % 2 == 0:
                return Fused(0, (shape[0] // 2,) * 2, labels)
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
    return Fused(axis, sizes, tuple(str(part) for part in range(len(sizes))))


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
    if fused is not None and axis != fused.axis:
        return _fused_grid(rows, cols, fused, sharding)
    full, at = _spread(sharding)
    if axis == 0:
        return Grid(cols, (Block(0, 0, 0, rows, cols, at, 0),), (MatrixShape("", full, cols),))
    if axis == 1:
        return Grid(cols, (Block(0, 0, 0, rows, cols, 0, at),), (MatrixShape("", rows, full),))
    return Grid(cols, (Block(0, 0, 0, rows, cols, 0, 0),), (MatrixShape("", rows, cols),))


def _fused_grid(rows: int, cols: int, fused: Fused, sharding: Sharding | None) -> Grid:
    """The grid of stacked matrices whose other axis may be sharded."""
    full, at = _spread(sharding)
    blocks, shapes, begin = [], [], 0
    for part, (size, label) in enumerate(zip(fused.sizes, fused.labels, strict=True)):
        if fused.axis == 0:
            blocks.append(Block(part, begin, 0, size, cols, 0, at))
            shapes.append(MatrixShape(f"[{label}]", size, full or cols))
        else:
            blocks.append(Block(part, 0, begin, rows, size, at, 0))
            shapes.append(MatrixShape(f"[{label}]", full or rows, size))
        begin += size
    return Grid(cols, tuple(blocks), tuple(shapes))


def _spread(sharding: Sharding | None) -> tuple[int, int]:
    """Return (full extent, where this rank's band begins) along the sharded dimension; zeros where there is none."""
    return (0, 0) if sharding is None else (sum(sharding.sizes), sum(sharding.sizes[: sharding.rank]))
