"""What vectors saw of an operand in its last iteration, kept until the weights move.

The next iteration of another matrix of the batch would write over it, and the block X becomes the
next one. Of every matrix that asks for it there are, laid out as in :mod:`.blocks`::

    x      (b, cols)           X, with which the last iteration multiplied
    z      (b, cols), (b, b)   Z = Yᵀ U and Yᵀ Y, where Y = U Xᵀ; Z then gives way to C = M Z
    left   (cut rows, b)       Y of those rows that no rank holds whole
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Blocks, Operand
from .tiles import Tile


class Seen:
    """See above.

    Args:
        blocks: the vectors, which are not resident.
        operand: the number of the operand.
        numbers: the matrices whose last iteration is kept.
    """

    def __init__(self, blocks: Blocks, operand: int, numbers: Sequence[int]) -> None:
        self.number, self.matrices = operand, frozenset(numbers)
        self._blocks, source = blocks, blocks.operands[operand]
        self.operand = Operand(blocks.matrices, blocks.cut, source.widths)
        lengths = [0, 0, 0]
        for batch in blocks.batches:
            lengths = list(map(max, lengths, self._lay_out(batch)))
        device, dtype = blocks.x.device, blocks.x.dtype
        self.x, self.z, self.left = (
            torch.zeros(length, device=device, dtype=dtype) for length in lengths
        )
        self.operand.share(self.x, self.z, self.left)
        self._views: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def _lay_out(self, batch: Sequence[int]) -> tuple[int, int, int]:
        """Give every matrix of a batch its places; return the lengths."""
        operand, x, z, left = self.operand, 0, 0, 0
        for k in batch:
            if k in self.matrices:
                of_x, of_z, of_left = operand.sizes(k)
                operand.x_at[k], x = x, x + of_x
                operand.z_at[k], z = z, z + of_z
                operand.left_at[k], left = left, left + of_left
        return x, z, left

    def keep(self, batch: int, mask: Tensor) -> None:
        """Keep what an iteration of the matrices in ``mask`` saw, whose sums are made; a later one
        takes its place.
        """
        chosen = mask.tolist()
        to: list[Tensor] = []
        values: list[Tensor] = []
        for k in self._blocks.batches[batch]:
            if k in self.matrices and chosen[k]:
                if k not in self._views:
                    self._views[k] = self._views_of(k)
                to += self._views[k][0]
                values += self._views[k][1]
        if to:
            torch._foreach_copy_(to, values)

    def _views_of(self, number: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return what is kept of a matrix here, and where its blocks have it."""
        blocks, source = self._blocks, self._blocks.operands[self.number]
        first, left = source.left_at[number], self.left_of(number)
        to = [self.operand.block(number), *self.operand.image(number), left]
        left_there = blocks.left[first : first + len(left)]
        return to, [source.block(number), *source.image(number), left_there]

    def left_of(self, number: int) -> Tensor:
        """Return Y of a matrix's cut rows, flat."""
        first = self.operand.left_at[number]
        return self.left[first : first + self.operand.sizes(number)[2]]

    def change(self, tile: Tile, row: int, piece: Tensor) -> Tensor:
        """Return Y C of a tile's rows from ``row`` on, ``piece`` (rows, tile.cols), of U."""
        part = slice(tile.col, tile.col + tile.cols)
        if tile.cols < self.operand.matrices[tile.matrix].cols:
            y = self.operand.left(tile)[row : row + len(piece)]
        else:
            y = piece @ self.operand.block(tile.matrix).T
        return y @ self.operand.image(tile.matrix)[0][:, part]


def check_cut(blocks: Blocks, tile: Tile) -> None:
    """Raise ValueError where a copy, which another rank measures, has a part of a row that is whole
    there, so that nothing sums the products of its parts.
    """
    matrix, cut = blocks.matrices[tile.matrix], blocks.cut[tile.matrix]
    if tile.cols < matrix.cols:
        rows = torch.arange(tile.row, tile.row + tile.rows, device=cut.device)
        if not torch.isin(rows, cut).all():
            raise ValueError(
                f"AdamW2: matrix '{matrix.name}' got copies that ranks have cut in different "
                "rows, which clip='project' does not understand; it takes clip='scale'."
            )
