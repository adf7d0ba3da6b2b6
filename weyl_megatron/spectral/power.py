"""Block power iteration for σ₁ of many matrices at once, none of which any rank needs to hold
whole.

One iteration multiplies a block X of a few vectors per matrix by WᵀW in one read of W, row by row::

    y = r X for each row r that a rank holds whole,    Z += rᵀ y,    Yᵀ Y += yᵀ y
    y of the rows that are cut between ranks is summed first, then treated alike
    all-reduce Z and Yᵀ Y,    σ₁ ≈ max over c of ‖Z c‖ / ‖Y c‖,    X = orth(Z)

The estimate is the largest singular value of Wᵀ on the span of Y: never above σ₁(W) but for
rounding. Half of a matrix's iterations are made in any case, the others until one gains next to
nothing. Only the blocks travel, b·n numbers a matrix and b for each row that is cut, and those of
all matrices lie in one buffer, so the number of collectives depends neither on the number of
matrices nor on that of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .blocks import Blocks, MatrixSpec, Operand, Table
from .collectives import Span, all_reduce_spans, start_all_reduce
from .iterations import Iterations
from .ritz import gain, gram, is_seen, largest_ratio, next_block
from .seen import Seen
from .tiles import Tile

#: Vectors per matrix. One alone is late where the top direction changes, and its dangerous error,
#: an underestimated σ₁(U), has a long tail; `python benchmarks/estimator.py` measures both.
BLOCK = 4

#: Iterations for vectors that nothing is known about: at the first step and after a resume.
COLD_ITERS = 12


class Products(Protocol):
    """What a kernel does for the iteration, on the matrices k with ``mask[k] != 0`` (uint8)."""

    def multiply(self, operand: int, table: Table, mask: Tensor) -> None:
        """Add Z and Yᵀ Y of whole rows, or Y of rows that are cut, to where the table says."""

    def multiply_back(self, operand: int, table: Table, mask: Tensor) -> None:
        """Add Z and Yᵀ Y of rows that are cut, whose Y have been summed."""

    def orthonormalize(
        self, operand: int, batch: int, mask: Tensor, more: Tensor, sigma: Tensor, gain: Tensor
    ) -> None:
        """Make the next blocks of a batch's matrices from Z; write σ₁ and ``ritz.gain`` of each, in
        float64.

        ``more`` tells the matrices that another iteration may follow for.
        """


class PowerIteration:
    """Estimate σ₁ of a fixed list of matrices, for several operands of the same layout (the
    weights, the updates).

    Collective over the matrices' groups.

    Args:
        matrices: every matrix that any rank of the groups holds a piece of, in the same order on
            all of them.
        tiles: the pieces that this rank holds; may be empty.
        widths: vectors per matrix, for each operand, as one number or one for each matrix.
        batches: which matrices are measured together; None: all.
        iters: iterations once the vectors are warm.
        least: those that are made even where the last one gained next to nothing
            (``ritz.SETTLED``); None: all.
        piggybacks: whether a number per matrix (``blocks.piggyback_at`` says where) travels with
            the first sums.
        device, dtype: of the vectors.
        resident: whether they stay where they are between steps (``Blocks``).
    """

    def __init__(
        self,
        matrices: Sequence[MatrixSpec],
        tiles: Sequence[Tile],
        *,
        widths: Sequence[int | Sequence[int]] = (BLOCK,),
        batches: Sequence[Sequence[int]] | None = None,
        iters: int = 2,
        least: int | None = None,
        piggybacks: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: bool = False,
    ) -> None:
        batches = [range(len(matrices))] if batches is None else batches
        self.blocks = Blocks(
            matrices,
            tiles,
            widths,
            batches,
            piggybacks,
            torch.device(device),
            dtype,
            resident=resident,
        )
        self.sigma = torch.zeros(len(widths), len(matrices), dtype=torch.float64, device=device)
        self.gain = torch.zeros_like(self.sigma)  #: of the last iteration of each, see ritz.gain
        #: the sums that travelled along
        self.piggybacked = torch.zeros(len(matrices), dtype=torch.float64, device=device)
        #: keeps what the last iterations saw, where that is wanted
        self.seen: Seen | None = None
        self._iters, self._least = iters, iters if least is None else least
        self._warm = False

    def sigmas(self, operands: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return σ₁ of every matrix of every operand, ``(operands, matrices)``, the same on every
        rank.

        Args:
            operands: for each operand its flat local buffers, in the numbering of ``Tile.buffer``.
        """
        products = TorchProducts(
            self.blocks, [partial(_whole_tile, buffers) for buffers in operands]
        )
        count = self._iters if self._warm else max(self._iters, COLD_ITERS)
        most = torch.full(self.sigma.shape, count, device=self.sigma.device)
        least = most.clamp(max=self._least) if self._warm else most
        iterations = Iterations(most, least)
        for batch in range(len(self.blocks.batches)):
            self.blocks.load(batch)
            self.measure(products, batch, iterations)
        self._warm = True
        return self.sigma.to(self.blocks.z.dtype)

    def measure(self, products: Products, batch: int, iterations: Iterations) -> None:
        """Iterate on a batch of matrices, whose blocks are loaded; leave their σ₁ in ``sigma``.

        Args:
            products: the kernel, with the operands that it multiplies.
            batch: the number of the batch.
            iterations: which matrices make which, equal on all ranks.
        """
        blocks = self.blocks
        for number in range(iterations.count):
            making = iterations.making(number, self.gain)
            if not making:
                break
            if number:
                blocks.clear(batch)
            beginning = iterations.beginning(number, making)
            for o, mask in beginning.items():  # Y of the rows that are cut between ranks
                products.multiply(o, blocks.operands[o].cut[batch], mask)
            finish = start_all_reduce(blocks.left, self._sums_of_left(batch, number, making))
            for o, mask in beginning.items():  # Y and Z of whole rows, while those sums travel
                products.multiply(o, blocks.operands[o].whole[batch], mask)
            finish()
            if number == 0 and blocks.piggybacks:
                summed = blocks.left[blocks.piggyback_at[batch]]
                self.piggybacked[blocks.piggyback_matrices[batch]] = summed.double()
            for o, mask in making.items():  # Z of the rows that are cut
                products.multiply_back(o, blocks.operands[o].cut[batch], mask)
            all_reduce_spans(blocks.z, self._sums_of_z(batch, making))
            if self.seen is not None and self.seen.number in making:
                self.seen.keep(batch, making[self.seen.number])
            for o, mask in making.items():  # σ₁, and the next X
                more = iterations.may_follow(number, o)
                products.orthonormalize(o, batch, mask, more, self.sigma[o], self.gain[o])
        blocks.store(batch)

    def _sums_of_left(self, batch: int, number: int, making: Mapping[int, Tensor]) -> list[Span]:
        """Return what of ``left`` is summed over ranks in iteration ``number``, in its order."""
        blocks = self.blocks
        spans = [
            span
            for o, mask in making.items()
            for span in _spread(blocks.left_spans[batch][o], mask)
        ]
        if number == 0 and blocks.piggybacks:
            in_any_operand = torch.stack(list(making.values())).amax(0)
            spans += _spread(blocks.piggyback_spans[batch], in_any_operand)
        return sorted(spans, key=lambda span: span.start)

    def _sums_of_z(self, batch: int, making: Mapping[int, Tensor]) -> list[Span]:
        """Return what of ``z`` is summed over ranks, in its order."""
        spans = [
            span
            for o, mask in making.items()
            for span in _spread(self.blocks.z_spans[batch][o], mask)
        ]
        return sorted(spans, key=lambda span: span.start)


def _spread(spans: Mapping[int, Span], mask: Tensor) -> list[Span]:
    """Return the spans of the matrices in ``mask`` that other ranks have pieces of."""
    spread = {k: span for k, span in spans.items() if span.groups}
    chosen = mask.tolist() if spread else []
    return [span for k, span in spread.items() if chosen[k]]


class TorchProducts:
    """The products in plain torch, from pieces of the operands as they come.

    Args:
        blocks: the vectors.
        pieces: for each operand, what yields a tile's elements in bands: (first row, (rows, cols)).
    """

    def __init__(
        self, blocks: Blocks, pieces: Sequence[Callable[[Tile], Iterable[tuple[int, Tensor]]]]
    ) -> None:
        self._blocks, self._pieces = blocks, pieces
        self._made: dict[tuple[int, int], list[list[_Stack]]] = {}  # by operand and batch

    def multiply(self, operand: int, table: Table, mask: Tensor) -> None:
        chosen = mask.tolist()
        for tile in table.tiles:
            if chosen[tile.matrix]:
                for row, piece in self._pieces[operand](tile):
                    multiply_band(self._blocks.operands[operand], tile, row, piece)

    def multiply_back(self, operand: int, table: Table, mask: Tensor) -> None:
        chosen, blocks = mask.tolist(), self._blocks.operands[operand]
        for tile in table.tiles:
            if chosen[tile.matrix]:
                left = blocks.left(tile)
                z, gram = blocks.image(tile.matrix)
                for row, piece in self._pieces[operand](tile):
                    band = left[row : row + len(piece)]
                    z[:, tile.col : tile.col + tile.cols].addmm_(band.T, piece.to(z.dtype))
                if tile.col == 0:
                    gram.addmm_(left.T, left)

    def orthonormalize(
        self, operand: int, batch: int, mask: Tensor, more: Tensor, sigma: Tensor, gained: Tensor
    ) -> None:
        eps = torch.finfo(self._blocks.z.dtype).eps
        for stacks in self._stacks(operand, batch, mask):
            at = torch.cat([stack.at for stack in stacks])
            images = [torch.stack(stack.z).double() for stack in stacks]
            olds = [torch.stack(stack.x).double() for stack in stacks]
            gram_y = torch.stack([view for stack in stacks for view in stack.gram]).double()
            gram_z = torch.cat([gram(z) for z in images])
            length = torch.cat([torch.linalg.vector_norm(old[:, 0], dim=-1) for old in olds])
            sigmas = largest_ratio(gram_y, gram_z, eps)
            is_chosen = None if is_seen(mask) else mask[at] != 0
            _write(sigma, at, sigmas, is_chosen)
            _write(gained, at, gain(gram_y, length, sigmas), is_chosen)
            is_more, first = more[at] != 0, 0
            for stack, z, old in zip(stacks, images, olds, strict=True):
                part = slice(first, first := first + len(z))
                new = next_block(z, old, sigmas[part], is_more[part])
                if is_chosen is not None:
                    new = torch.where(is_chosen[part, None, None], new, old)
                torch._foreach_copy_(stack.x, list(new.to(self._blocks.x.dtype)))

    def _stacks(self, operand: int, batch: int, mask: Tensor) -> list[list[_Stack]]:
        """Return what has the same ranks and width, by its number of columns; where the host sees
        the mask, only what is in it.
        """
        if (operand, batch) not in self._made:
            blocks = self._blocks.operands[operand]
            self._made[operand, batch] = _alike(blocks, self._blocks.batches[batch])
        made = self._made[operand, batch]
        if not is_seen(mask):
            return made
        chosen = mask.tolist()
        some = [[stack.only(chosen) for stack in stacks] for stacks in made]
        some = [[stack for stack in stacks if stack.x] for stacks in some]
        return [stacks for stacks in some if stacks]


class _Stack(NamedTuple):
    """Matrices whose blocks have one shape, which are worked on in the same calls.

    They are spread over the same ranks, too: what a device's call rounds may hang on what else is
    in it, and has to be one on all ranks of a matrix.
    """

    numbers: list[int]  # of the matrices
    at: Tensor  # the same, on their device
    x: list[Tensor]  # of each, views of its block, its image and its Yᵀ Y
    z: list[Tensor]
    gram: list[Tensor]

    def only(self, chosen: Sequence[int]) -> _Stack:
        """Return those of the matrices that are chosen."""
        keeps = [chosen[k] for k in self.numbers]
        if all(keeps):
            return self
        numbers = list(compress(self.numbers, keeps))
        x, z, gram = (list(compress(views, keeps)) for views in (self.x, self.z, self.gram))
        return _Stack(numbers, torch.tensor(numbers, dtype=torch.int64), x, z, gram)


def _alike(blocks: Operand, batch: Sequence[int]) -> list[list[_Stack]]:
    """Return the stacks of a batch: those of the same ranks and width in one list."""
    numbers: dict[Any, dict[int, list[int]]] = {}
    for k in batch:
        matrix = blocks.matrices[k]
        alike = numbers.setdefault((matrix.groups, blocks.widths[k]), {})
        alike.setdefault(matrix.cols, []).append(k)
    return [[_stack(blocks, members) for members in alike.values()] for alike in numbers.values()]


def _stack(blocks: Operand, members: list[int]) -> _Stack:
    images, grams = zip(*(blocks.image(k) for k in members), strict=True)
    x = [blocks.block(k) for k in members]
    at = torch.tensor(members, dtype=torch.int64).to(x[0].device)
    return _Stack(members, at, x, list(images), list(grams))


def _write(to: Tensor, at: Tensor, values: Tensor, is_chosen: Tensor | None) -> None:
    """Write values to their places, or, of a mask, those that are chosen."""
    if is_chosen is not None:
        values = torch.where(is_chosen, values, to[at])
    to.index_copy_(0, at, values)


def multiply_band(blocks: Operand, tile: Tile, row: int, piece: Tensor) -> None:
    """Add the products of a tile's rows from ``row`` on, ``piece`` (rows, tile.cols), to where they
    belong.
    """
    x = blocks.block(tile.matrix)[:, tile.col : tile.col + tile.cols]
    piece = piece.to(x.dtype)
    y = piece @ x.T  # (rows, b)
    if tile.cols < blocks.matrices[tile.matrix].cols:
        blocks.left(tile)[row : row + len(piece)].add_(y)
        return
    z, gram = blocks.image(tile.matrix)
    z.addmm_(y.T, piece)
    gram.addmm_(y.T, y)


def rows_of(tensor: Tensor, tile: Tile, row: int, rows: int) -> Tensor:
    """Return rows ``[row, row + rows)`` of a tile, ``(rows, cols)``, as they lie in its flat
    buffer.
    """
    start = tensor.storage_offset() + tile.offset + row * tile.stride
    return tensor.as_strided((rows, tile.cols), (tile.stride, 1), start)


def _whole_tile(buffers: Sequence[Tensor], tile: Tile) -> Iterable[tuple[int, Tensor]]:
    return [(0, rows_of(buffers[tile.buffer], tile, 0, tile.rows))]
