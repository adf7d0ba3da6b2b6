"""Where the vectors of many matrices lie, for every operand that is measured (the weights, the
updates).

A matrix has, per operand, a block X of a few vectors that is kept from step to step, and room for
what is made of it::

    kept   (b, cols)           the block between steps
    x      (b, cols)           the block while the matrix is measured
    z      (b, cols), (b, b)   Z = Wᵀ Y and Yᵀ Y, where Y = W X; side by side: summed together
    left   (cut rows, b)       Y of those rows that no rank holds whole

``kept`` is in bfloat16 where there are many blocks that no other rank shares. All of it lies in
flat buffers: one collective carries everything, and a kernel finds each piece by a number. All but
``kept`` is needed only while a matrix is measured, so matrices that no other rank has pieces of
take turns (batches). Where they do not, blocks are *resident*: ``kept`` is ``x``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .collectives import Span, all_reduce_spans
from .tiles import Tile

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MatrixSpec(NamedTuple):
    """A matrix whose σ₁ is wanted: its full size and the process groups over whose ranks it is
    spread.
    """

    name: str
    rows: int
    cols: int
    groups: tuple[ProcessGroup, ...] = ()


#: What kernels read of a tile, by column: where it lies in its buffer, where its part of x and of z
#: and where Yᵀ Y begins, the matrix's columns n and block width b, where its rows lie in ``left``
#: (-1: they are whole), and whether it counts the cut rows in Yᵀ Y (just one tile of a row does).
#: ``matrix`` -1 is none, ``width`` 0 is measured elsewhere.
COLUMNS = (
    "buffer",
    "offset",
    "rows",
    "cols",
    "stride",
    "matrix",
    "x",
    "z",
    "n",
    "width",
    "gram",
    "left",
    "counts",
)


#: More elements of blocks than these are kept in half the bytes. Fewer would save nothing, and of a
#: block that is small one element that is rounded the other way is a part that can be felt.
_FEW = 1 << 16


#: Elements of float32 that a GPU loads at once.
_ALIGNED = 4


class Table(NamedTuple):
    """Tiles of one batch and the same as integers, ``(tiles, len(COLUMNS))`` on the device of the
    vectors.
    """

    tiles: list[Tile]
    columns: Tensor


class Operand:
    """The blocks of one operand: one σ₁ per matrix."""

    def __init__(
        self,
        matrices: Sequence[MatrixSpec],
        cut: Sequence[Tensor],
        width: int | Sequence[int],
    ) -> None:
        self.matrices, self._cut = matrices, cut
        each = [width] * len(matrices) if isinstance(width, int) else width
        self.widths = [min(w, m.rows, m.cols) for w, m in zip(each, matrices, strict=True)]
        self.x_at = [0] * len(self.matrices)
        self.z_at = [0] * len(self.matrices)
        self.left_at = [0] * len(self.matrices)
        self.whole: list[Table] = []  # per batch, tiles of whole rows
        self.cut: list[Table] = []  # and tiles of rows that other tiles go on with
        self.shape = torch.empty(0)  # (matrices, 5): where x and z begin, n, b, where Yᵀ Y begins
        self.kept: list[Tensor] = []  # per batch, of its matrices in the batch's order
        self.working: list[Tensor] = []  # where they are in ``x`` while they are measured
        self._x = self._z = self._left = torch.empty(0)  # shared by all operands

    def share(self, x: Tensor, z: Tensor, left: Tensor) -> None:
        """Take the buffers that all operands share."""
        self._x, self._z, self._left = x, z, left

    def sizes(self, number: int) -> tuple[int, int, int]:
        """Return how many elements a matrix's X has, its Z with the Yᵀ Y behind it, and its Y of
        cut rows.
        """
        b, cols = self.widths[number], self.matrices[number].cols
        return b * cols, b * (cols + b), b * len(self._cut[number])

    def block(self, number: int) -> Tensor:
        """Return X of a matrix of the batch that is measured, ``(b, cols)``."""
        b, cols, at = self.widths[number], self.matrices[number].cols, self.x_at[number]
        return self._x[at : at + b * cols].view(b, cols)

    def image(self, number: int) -> tuple[Tensor, Tensor]:
        """Return Z of a matrix of that batch, ``(b, cols)``, and its Yᵀ Y, ``(b, b)``."""
        b, cols, at = self.widths[number], self.matrices[number].cols, self.z_at[number]
        return self._z[at : at + b * cols].view(b, cols), self.gram(number)

    def gram(self, number: int) -> Tensor:
        b, at = self.widths[number], self._gram_at(number)
        return self._z[at : at + b * b].view(b, b)

    def left(self, tile: Tile) -> Tensor:
        """Return Y of a tile's rows, which are cut, ``(rows, b)``."""
        at, b = self.left_place(tile), self.widths[tile.matrix]
        return self._left[at : at + tile.rows * b].view(tile.rows, b)

    def tabulate(
        self, batches: Sequence[Sequence[int]], tiles: Sequence[Tile], device: torch.device
    ) -> None:
        """Make the tables of every batch, once all places are known."""
        batch_of = {k: number for number, batch in enumerate(batches) for k in batch}
        whole: list[list[Tile]] = [[] for _ in batches]
        cut: list[list[Tile]] = [[] for _ in batches]
        for tile in sorted(tiles, key=lambda tile: tile.matrix):
            is_cut = tile.cols < self.matrices[tile.matrix].cols
            (cut if is_cut else whole)[batch_of[tile.matrix]].append(tile)
        self.whole = [table([self.row(t) for t in part], device, part) for part in whole]
        self.cut = [table([self.row(t) for t in part], device, part) for part in cut]
        shapes = [
            [self.x_at[k], self.z_at[k], matrix.cols, self.widths[k], self._gram_at(k)]
            for k, matrix in enumerate(self.matrices)
        ]
        self.shape = torch.tensor(shapes, dtype=torch.int64).view(-1, 5).to(device)

    def row(self, tile: Tile) -> list[int]:
        """Return a tile's row of a kernel's table."""
        k = tile.matrix
        left = self.left_place(tile) if tile.cols < self.matrices[k].cols else -1
        place = [tile.buffer, tile.offset, tile.rows, tile.cols, tile.stride, k]
        vectors = [self.x_at[k] + tile.col, self.z_at[k] + tile.col]
        matrix = [self.matrices[k].cols, self.widths[k], self._gram_at(k)]
        return [*place, *vectors, *matrix, left, int(tile.col == 0)]

    def _gram_at(self, number: int) -> int:
        return self.z_at[number] + self.widths[number] * self.matrices[number].cols

    def left_place(self, tile: Tile) -> int:
        """Return where Y of a tile's rows, which are cut, begin in ``left``."""
        slot = int(torch.searchsorted(self._cut[tile.matrix], tile.row))
        return self.left_at[tile.matrix] + slot * self.widths[tile.matrix]


class Blocks:
    """The vectors of all operands of a list of matrices.

    Collective over the matrices' groups.

    Args:
        matrices: all of them, in an order that the ranks share.
        tiles: the pieces that this rank holds.
        widths: vectors per matrix, for each operand, as one number or one for each matrix (fewer
            where the matrix is smaller).
        batches: the numbers of the matrices that are measured together; each matrix is in one
            batch.
        piggybacks: whether a number per matrix travels along with the first sums of ``left``.
        device, dtype: of the vectors.
        resident: whether the blocks of the only batch stay in ``x`` between steps. Then every place
            in ``x`` and ``z`` begins at a multiple of four elements, and behind YᵀY there is room
            for one more number, which is summed with it.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixSpec],
        tiles: Sequence[Tile],
        widths: Sequence[int | Sequence[int]],
        batches: Sequence[Sequence[int]],
        piggybacks: bool,
        device: torch.device,
        dtype: torch.dtype,
        *,
        resident: bool = False,
    ) -> None:
        self.matrices, self._resident = list(matrices), resident
        self.batches = [list(batch) for batch in batches]
        self.cut = _cut_rows(self.matrices, tiles, device)
        self.operands = [Operand(self.matrices, self.cut, width) for width in widths]
        self.piggybacks = piggybacks
        # per batch the matrices, and where their piggybacks lie in ``left``
        self.piggyback_matrices: list[Tensor] = []
        self.piggyback_at: list[Tensor] = []
        self.z_spans: list[list[dict[int, Span]]] = []  # per batch and operand, by matrix
        self.left_spans: list[list[dict[int, Span]]] = []
        self.piggyback_spans: list[dict[int, Span]] = []  # per batch, by matrix
        sizes = [self._lay_out(batch, device) for batch in self.batches]
        self.z_sizes, self.left_sizes = [z for _, z, _ in sizes], [left for _, _, left in sizes]
        longest = [max(lengths) for lengths in zip(*sizes, strict=True)] if sizes else [0, 0, 0]
        self.x, self.z, self.left = (
            torch.zeros(length, device=device, dtype=dtype) for length in longest
        )
        for operand in self.operands:
            operand.share(self.x, self.z, self.left)
        self._make_room(device)
        self.restart()
        for operand in self.operands:
            operand.tabulate(self.batches, tiles, device)

    def restart(self) -> None:
        """Keep the start blocks, where the blocks before them lay: kernels know the addresses."""
        if self._resident:
            for operand in self.operands:
                for k, matrix in enumerate(self.matrices):
                    start = start_block(matrix.name, matrix.cols, operand.widths[k])
                    operand.block(k).copy_(start.T)
            return
        for number, batch in enumerate(self.batches):
            for operand in self.operands:
                starts = [
                    start_block(self.matrices[k].name, self.matrices[k].cols, operand.widths[k])
                    for k in batch
                ]
                operand.kept[number].copy_(
                    torch.cat([start.T.flatten() for start in starts] or [torch.empty(0)])
                )

    def load(self, batch: int) -> None:
        """Take a batch's blocks out and make room for its sums."""
        for operand in self.operands:
            operand.working[batch].copy_(operand.kept[batch])
        self.clear(batch)

    def clear(self, batch: int) -> None:
        """Set a batch's sums to zero."""
        self.z[: self.z_sizes[batch]].zero_()
        self.left[: self.left_sizes[batch]].zero_()

    def store(self, batch: int) -> None:
        """Keep a batch's blocks."""
        for operand in self.operands:
            operand.kept[batch].copy_(operand.working[batch])

    def kept(self) -> list[list[Tensor]]:
        """Return the block that every matrix keeps of each operand, flat, as views."""
        if self._resident:
            matrices = range(len(self.matrices))
            return [[operand.block(k).view(-1) for operand in self.operands] for k in matrices]
        blocks: list[list[Tensor]] = [[] for _ in self.matrices]
        for operand in self.operands:
            for batch, kept in zip(self.batches, operand.kept, strict=True):
                sizes = [operand.sizes(k)[0] for k in batch]
                for k, block in zip(batch, torch.split(kept, sizes), strict=True):
                    blocks[k].append(block)
        return blocks

    def _make_room(self, device: torch.device) -> None:
        """Allocate what is kept of every batch, and note where it is in ``x`` while the batch is
        measured.
        """
        if self._resident:
            return
        sizes = [
            [operand.sizes(k)[0] for k in range(len(self.matrices))] for operand in self.operands
        ]
        has_many = self.x.dtype == torch.float32 and sum(map(sum, sizes)) > _FEW
        for batch in self.batches:
            # Ranks that share a matrix may differ in what else they have, and not in a rounding.
            is_spread = bool(batch and self.matrices[batch[0]].groups)
            dtype = torch.bfloat16 if has_many and not is_spread else self.x.dtype
            for operand, size in zip(self.operands, sizes, strict=True):
                first, length = operand.x_at[batch[0]] if batch else 0, sum(size[k] for k in batch)
                operand.kept.append(torch.empty(length, device=device, dtype=dtype))
                operand.working.append(self.x[first : first + length])

    def _lay_out(self, batch: Sequence[int], device: torch.device) -> tuple[int, int, int]:
        """Give every matrix of a batch its places in ``x``, ``z`` and ``left``; return their
        lengths.
        """
        x = z = left = 0
        for operand in self.operands:
            for k in batch:
                operand.x_at[k] = x
                x = self._aligned(x + operand.sizes(k)[0])
        z_spans: list[dict[int, Span]] = [{} for _ in self.operands]
        left_spans: list[dict[int, Span]] = [{} for _ in self.operands]
        piggyback_spans: dict[int, Span] = {}
        # One operand of all matrices that are spread alike lies together: one collective's buffer.
        for groups in dict.fromkeys(self.matrices[k].groups for k in batch):
            members = [k for k in batch if self.matrices[k].groups == groups]
            for k in members:
                piggyback_spans[k] = Span(groups, left, left + self.piggybacks)
                left += self.piggybacks
            for number, operand in enumerate(self.operands):
                for k in members:
                    _, of_z, of_left = operand.sizes(k)
                    operand.z_at[k] = z
                    z = self._aligned(z + of_z + self._resident)
                    operand.left_at[k], left = left, left + of_left
                    z_spans[number][k] = Span(groups, operand.z_at[k], z)
                    left_spans[number][k] = Span(groups, operand.left_at[k], left)
        self.z_spans.append(z_spans)
        self.left_spans.append(left_spans)
        self.piggyback_spans.append(piggyback_spans)
        self.piggyback_matrices.append(
            torch.tensor(list(piggyback_spans), dtype=torch.int64, device=device)
        )
        self.piggyback_at.append(
            torch.tensor([span.start for span in piggyback_spans.values()], device=device).long()
        )
        return x, z, left

    def _aligned(self, place: int) -> int:
        return -(-place // _ALIGNED) * _ALIGNED if self._resident else place


def table(rows: list[list[int]], device: torch.device, tiles: list[Tile]) -> Table:
    """Return a kernel's table of ``tiles``."""
    return Table(tiles, torch.tensor(rows, dtype=torch.int64).view(-1, len(COLUMNS)).to(device))


def start_block(name: str, cols: int, width: int) -> Tensor:
    """Return the orthonormal start block ``(cols, width)`` of a matrix's name, the same on every
    rank, in float64.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    noise = torch.randn(
        width, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    orthonormal: Tensor = torch.linalg.qr(noise.T).Q
    return orthonormal


def can_fit(saved: Sequence[Tensor], kept: Sequence[Tensor], cols: int) -> bool:
    """Whether blocks that were saved are those of a matrix of so many columns, W's of the same and
    U's of any width.
    """
    sizes = [block.numel() for block in saved]
    is_same = len(sizes) == len(kept) and sizes[:1] == [block.numel() for block in kept[:1]]
    return is_same and all(size and size % cols == 0 for size in sizes)


def fitted(block: Tensor, size: int, matrix: MatrixSpec) -> Tensor:
    """Return a flat block, as another run kept it, with ``size`` elements: its first vectors, or
    all of them and directions of the start block that are orthonormal to them.
    """
    if block.numel() >= size:
        return block.flatten()[:size]
    kept = block.view(-1, matrix.cols).double()
    fresh = start_block(matrix.name, matrix.cols, size // matrix.cols).T.to(kept.device)
    fresh = fresh[len(kept) :]
    basis = torch.linalg.qr(kept.T).Q  # what was kept is rounded
    for _ in range(2):
        fresh = fresh - (fresh @ basis) @ basis.T
    return torch.cat([kept, torch.linalg.qr(fresh.T).Q.T]).flatten()


def _cut_rows(
    matrices: Sequence[MatrixSpec], tiles: Sequence[Tile], device: torch.device
) -> list[Tensor]:
    """Return, per matrix, the rows of which no rank holds all columns, ascending. Collective over
    the matrices' groups.

    Ranges of a flattened matrix (ZeRO) cut a row at each boundary, bands of columns (tensor
    parallelism) every row.
    """
    starts = [0]
    for matrix in matrices:
        starts.append(starts[-1] + matrix.rows)
    cut = torch.zeros(starts[-1], device=device)
    for tile in tiles:
        if tile.cols < matrices[tile.matrix].cols:
            begin = starts[tile.matrix] + tile.row
            cut[begin : begin + tile.rows] = 1
    all_reduce_spans(
        cut, [Span(matrix.groups, starts[k], starts[k + 1]) for k, matrix in enumerate(matrices)]
    )
    cut = cut.cpu()
    return [cut[starts[k] : starts[k + 1]].nonzero().flatten() for k in range(len(matrices))]
