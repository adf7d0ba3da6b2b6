"""Block power iteration for σ₁ of many matrices at once, none of which any rank needs to hold whole.

One iteration multiplies an orthonormal block X of a few vectors per matrix by W and by Wᵀ::

    Y = Σ_tiles W[tile] @ X[cols],   all-reduce,   Q = orth(Y)         (rows, b)
    Z = Σ_tiles W[tile]ᵀ @ Q[rows],  all-reduce,   X, R = qr(Z)        (cols, b)

and σ₁(R) is the largest singular value of W restricted to span(Q): never above σ₁(W) but for rounding. Only the
blocks travel, b·(m + n) numbers a matrix, and those of all matrices lie in one buffer, so the number of collectives
depends neither on the number of matrices nor on that of layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from weyl_megatron.spectral.collectives import Span, all_reduce_spans
from weyl_megatron.spectral.tiles import Tile

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Vectors per matrix. One alone is late where the top direction changes, and its dangerous error, an underestimated
#: σ₁(U), has a long tail; `python benchmarks/estimator.py` measures both. W and U are still read once per product.
BLOCK = 4

#: Iterations for vectors that nothing is known about: at the first step and after a resume.
COLD_ITERS = 12


class MatrixSpec(NamedTuple):
    """A matrix whose σ₁ is wanted: its full size and the process groups over whose ranks it is spread."""

    name: str
    rows: int
    cols: int
    groups: tuple[ProcessGroup, ...] = ()


class _Bucket(NamedTuple):
    """Matrices of one shape and one spread; their vectors are views (operands · count, length, block)."""

    members: tuple[int, ...]
    left: Tensor  # (operands * count, rows, b)
    right: Tensor  # (operands * count, cols, b)


def start_block(name: str, cols: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the orthonormal start block ``(cols, width)`` that belongs to a matrix's name on every rank and run."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    noise = torch.randn(cols, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(noise).Q
    return orthonormal.to(dtype)


class PowerIteration:
    """Estimate σ₁ of a fixed list of matrices, for several operands of the same layout (the weights, the updates).

    Args:
        matrices: every matrix that any rank of the groups holds a piece of, in the same order on all of them.
        tiles: the pieces that this rank holds; may be empty.
        operands: how many sets of buffers each call of :meth:`sigmas` measures.
        iters: iterations per call once the vectors are warm.
        block: vectors per matrix.
        device, dtype: of the vectors.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixSpec],
        tiles: Sequence[Tile],
        *,
        operands: int = 1,
        iters: int = 2,
        block: int = BLOCK,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._count = len(matrices)
        self._operands = operands
        self._iters = iters
        self._block = block
        self._warm = False
        self._dtype = dtype
        self._tiles = list(tiles)
        self._device = torch.device(device)
        self._allocate(matrices)
        self._views = [[self._tile_views(operand, tile) for tile in self._tiles] for operand in range(operands)]

    def _allocate(self, matrices: Sequence[MatrixSpec]) -> None:
        """Lay out all vectors in two flat buffers, matrices of the same spread side by side."""
        shapes: dict[tuple[tuple[ProcessGroup, ...], int, int], list[int]] = {}
        for index, matrix in enumerate(matrices):
            shapes.setdefault((matrix.groups, matrix.rows, matrix.cols), []).append(index)
        spreads = list(dict.fromkeys(groups for groups, _, _ in shapes))
        order = sorted(shapes, key=lambda key: spreads.index(key[0]))
        widths = {key: min(self._block, key[1], key[2]) for key in order}
        blocks = {key: self._operands * len(shapes[key]) * widths[key] for key in order}
        self._left = torch.zeros(sum(blocks[k] * k[1] for k in order), device=self._device, dtype=self._dtype)
        self._right = torch.zeros(sum(blocks[k] * k[2] for k in order), device=self._device, dtype=self._dtype)

        self._buckets: list[_Bucket] = []
        self._left_spans: list[Span] = []
        self._right_spans: list[Span] = []
        self._slot: dict[int, tuple[int, int]] = {}  # matrix -> (bucket, position in it)
        left = right = 0
        for key in order:
            (groups, rows, cols), members, width = key, shapes[key], widths[key]
            count = self._operands * len(members)
            left_stop, right_stop = left + blocks[key] * rows, right + blocks[key] * cols
            bucket = _Bucket(
                tuple(members),
                self._left[left:left_stop].view(count, rows, width),
                self._right[right:right_stop].view(count, cols, width),
            )
            self._left_spans.append(Span(groups, left, left_stop))
            self._right_spans.append(Span(groups, right, right_stop))
            for position, index in enumerate(members):
                self._slot[index] = len(self._buckets), position
                start = start_block(matrices[index].name, cols, width, self._dtype)
                for operand in range(self._operands):
                    bucket.right[operand * len(members) + position].copy_(start)
            self._buckets.append(bucket)
            left, right = left_stop, right_stop

    def _tile_views(self, operand: int, tile: Tile) -> tuple[Tensor, Tensor]:
        number, position = self._slot[tile.matrix]
        bucket = self._buckets[number]
        slot = operand * len(bucket.members) + position
        return (
            bucket.left[slot, tile.row : tile.row + tile.rows],  # (rows, b)
            bucket.right[slot, tile.col : tile.col + tile.cols],  # (cols, b)
        )

    def sigmas(self, operands: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return σ₁ of every matrix of every operand, ``(operands, matrices)``, the same on every rank.

        Args:
            operands: for each operand its flat local buffers, in the numbering of ``Tile.buffer``.
        """
        result = torch.zeros(self._operands, self._count, device=self._device, dtype=self._dtype)
        if not self._count:
            return result
        pieces = [[self._piece(buffers, tile) for tile in self._tiles] for buffers in operands]
        triangles: list[Tensor] = []
        for _ in range(self._iters if self._warm else max(self._iters, COLD_ITERS)):
            self._left.zero_()
            for piece, (left, right) in self._products(pieces):
                left.addmm_(piece, right)  # Y = W X
            all_reduce_spans(self._left, self._left_spans)
            for bucket in self._buckets:
                bucket.left.copy_(torch.linalg.qr(bucket.left).Q)
            self._right.zero_()
            for piece, (left, right) in self._products(pieces):
                right.addmm_(piece.t(), left)  # Z = Wᵀ Q
            all_reduce_spans(self._right, self._right_spans)
            triangles = []
            for bucket in self._buckets:
                q, r = torch.linalg.qr(bucket.right)
                bucket.right.copy_(q)
                triangles.append(r)
        self._warm = True
        for bucket, r in zip(self._buckets, triangles, strict=True):
            finite = r.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # LAPACK's SVD stops at others
            sigma = torch.linalg.matrix_norm(torch.where(finite, r, 0), 2)
            sigma = torch.where(finite.flatten(), sigma, torch.nan)
            result[:, list(bucket.members)] = sigma.view(self._operands, -1)
        return result

    def _products(self, pieces: list[list[Tensor]]) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        return [pair for mine, views in zip(pieces, self._views, strict=True) for pair in zip(mine, views, strict=True)]

    def _piece(self, buffers: Sequence[Tensor], tile: Tile) -> Tensor:
        """Return the tile's elements (rows, cols) in the vectors' dtype; no copy where the dtype is the same."""
        buffer = buffers[tile.buffer]
        start = buffer.storage_offset() + tile.offset
        return buffer.as_strided((tile.rows, tile.cols), (tile.stride, 1), start).to(self._dtype)

    def forget(self) -> None:
        """Make the next call iterate as if the vectors were new (after a checkpoint was loaded)."""
        self._warm = False
