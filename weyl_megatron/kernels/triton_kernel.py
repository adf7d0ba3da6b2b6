"""The step on a GPU in Triton (triton_step/): a number of launches that does not grow with depth.

Nothing here waits for the device: kernels read from masks what they are to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rule import ROUNDING
from ..spectral import ritz
from ..spectral.blocks import Blocks
from ..spectral.tiles import Tile
from . import units
from .passes import Passes, passes_of
from .staging import Staging, count_as_changed
from .stepped import Stepped
from .triton_step import (
    adamw,
    collect,
    decisions,
    numbers,
    orthonormalize,
    products,
    project,
)
from .triton_step.tables import TYPES, state_types

#: Programs of the products that run at once on a multiprocessor.
_PROGRAMS = 4

#: Threads of a program of the products, each with four columns of a row at a time.
_LANES = 64

#: Rows that such a program has in registers, by vectors of its block: of W, and of U, which is
#: formed of M and V.
_ROWS = {4: (8, 4), 8: (4, 4), 16: (4, 4)}

#: Registers that a thread of such a program may have, by vectors: left to itself ptxas spills some
#: for the sake of one program more.
_REGISTERS = {4: 168, 8: 255, 16: 255}

#: Columns of Z that a program sums, four a thread, and the rows that it reads at once, by vectors:
#: of W and of U.
_COLS = 4 * _LANES
_AGAIN = {4: (8, 4), 8: (8, 8), 16: (8, 8)}

#: The registers that a thread of it may have.
_OF_COLLECT = 255

#: Elements of a run that a program of an elementwise pass has in registers; at its ends so many.
_RUN, _ENDS = 1024, 256

#: Columns that a program of the small algebra has in registers, by vectors, and the registers that
#: a thread of it may have.
_ALGEBRA = {4: (256, 128), 8: (256, 255), 16: (256, 255)}

#: Warps of the program that decides how a matrix is projected, and rows that the move of it reads
#: at once, by vectors.
_OF_CLIP = {4: 1, 8: 2, 16: 4}
_MOVED = {4: 4, 8: 4, 16: 4}


class _Cut(NamedTuple):
    """The tables of units for some dtypes, and where units leave what they sum."""

    passes: Passes
    products: units.Products
    lines: Tensor  # Y of whole rows
    grams: Tensor  # (units, b, b): YᵀY of whole rows
    of_products: Tensor  # (units, 3): Σ u²
    of_strips: Tensor  # Z
    counters: Tensor  # of strips that are done, 0 between launches
    of_passes: Tensor  # (units, 3): Σ u², Σ w² before and after
    of_moves: Tensor  # (pieces,): Σ w² after


class TritonKernel:
    """A step's launches on the matrices of resident blocks, as far as bytes in ``masks`` let them.

    ``numbers`` is ``(numbers.ROWS, matrices)``, float64, and ``norms`` ``(matrices, 2)``: Σ u² and
    whether the weights are others, of what was stepped early.

    Args:
        blocks: the vectors of W and of U.
        tiles: all that is ever stepped; the first ``measured`` are measured here.
        buffers: in how many tensors it lies.
        projected: the matrices whose singular values are clipped.
    """

    def __init__(
        self,
        blocks: Blocks,
        tiles: Sequence[Tile],
        measured: int,
        buffers: int,
        projected: Sequence[int] = (),
    ) -> None:
        self._blocks, self._tiles = blocks, tiles
        self._measured, self._projected = measured, projected
        self._copies = [tile for tile in tiles[measured:] if tile.matrix in set(projected)]
        self._matrices = matrices = len(blocks.matrices)
        device = blocks.x.device
        widths = (max(operand.widths, default=1) for operand in blocks.operands)
        self._widths = [max(4, 1 << (width - 1).bit_length()) for width in widths]
        self._programs = _PROGRAMS * multiprocessors(device)
        self._kinds: tuple[units.Dtypes, ...] | None = None  # that the tables are cut for
        self._staging = staging = Staging(buffers, matrices, device)
        self.pointers, self.hypers, self.numbers = staging.pointers, staging.hypers, staging.numbers
        self.norms = torch.zeros(matrices, 2, dtype=torch.float64, device=device)
        self.masks = torch.zeros(numbers.MASKS, matrices, dtype=torch.uint8, device=device)
        factors = len(blocks.operands) * matrices * self._widths[1] ** 2
        self._factors = torch.zeros(factors, dtype=torch.float64, device=device)
        # What projection needs of a matrix's last iteration, and its M.
        self._grams = torch.zeros_like(self._factors)
        self._kept_z = self._kept_left = torch.zeros(0, device=device)
        if projected:
            self._kept_z, self._kept_left = map(torch.zeros_like, (blocks.z, blocks.left))
        self._changes = torch.zeros(matrices * self._widths[1] ** 2, device=device)
        self.numbers[int(numbers.PROJECTS), list(projected)] = 1
        sizes = zip(blocks.operands[1].widths, blocks.matrices, strict=True)
        is_whole = [float(width == min(m.rows, m.cols)) for width, m in sizes]
        self.numbers[int(numbers.WHOLE)] = torch.tensor(is_whole, dtype=torch.float64)
        self._alive: object = None

    def bind(
        self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None], sent: Sequence[Tensor]
    ) -> None:
        """Take the tensors of this step, and what the host tells of every matrix.

        Args:
            weights, stepped: by buffer; None where there is no gradient, whose U is 0.
            sent: the first rows of ``numbers``, on the CPU.
        """
        kinds = tuple(
            units.Dtypes(*[weight.dtype] * 4)
            if state is None
            else units.Dtypes(
                weight.dtype, state.grad.dtype, state.exp_avg.dtype, state.exp_avg_sq.dtype
            )
            for weight, state in zip(weights, stepped, strict=True)
        )
        if kinds != self._kinds:
            self._kinds, self._now = kinds, self._cut(kinds)
        self._staging.send(weights, stepped, sent)
        self._alive = weights, stepped  # the tensors at these addresses
        count_as_changed(weights)

    def release(self) -> None:
        """Let go of the tensors of this step: a gradient must not outlive it."""
        self._alive = None

    def expect(self) -> None:
        """Decide which matrices are stepped early."""
        decisions.expect[self._grid](
            self.numbers, self.masks, self._matrices, LANES=128, num_warps=1
        )

    def step(self) -> None:
        """Step what is no matrix and what is expected to be settled, in one pass, and leave its
        norms.
        """
        self._pass(adamw.STEP.value)
        spans = self._now.passes.spans
        sums = self._now.of_passes
        decisions.add_norms[(self._matrices,)](
            spans, self.numbers, self.masks, sums, self.norms, self._matrices, LANES=32, num_warps=1
        )

    def settle(self, iterations: int, *, cold: bool) -> None:
        """Decide from the norms, summed over ranks, what is settled, and take back what is not."""
        decisions.settle[self._grid](
            self.numbers,
            self.masks,
            self.norms,
            self._matrices,
            iterations,
            iterations // 2,
            COLD=cold,
            LANES=128,
            num_warps=1,
        )

    def undo(self) -> None:
        """Take the move at the scheduled rate back where it was not settled."""
        self._pass(adamw.UNDO.value)

    def multiply(self, number: int, rounds: tuple[int, int]) -> None:
        """Make Y in iteration ``number``.

        Args:
            number: from 0; the first updates the moments of U on its way.
            rounds: how many iterations are made of any W and of any U.
        """
        cut = self._now.products
        is_of_both = number < rounds[0]
        rows = [_ROWS[width][operand] for operand, width in enumerate(self._widths)]
        for dtypes, start, stop in cut.launches if is_of_both else cut.of_update:
            products.products[(stop - start,)](
                cut.units,
                start,
                self.pointers,
                self.hypers,
                self.masks,
                self._blocks.x,
                self._blocks.left,
                self._now.lines,
                self._now.grams,
                self._now.of_products,
                self._matrices,
                FIRST=number == 0,
                BLOCK_W=self._widths[0],
                ROWS_W=rows[0],
                BLOCK_U=self._widths[1],
                ROWS_U=rows[1],
                LANES=_LANES,
                GRAD=TYPES[dtypes.grad if number == 0 else dtypes.weight],
                **state_types(dtypes),
                num_warps=_LANES // 32,
                maxnreg=_REGISTERS[max(self._widths)],
            )

    def collect(self, number: int) -> None:
        """Make Z and YᵀY, once Y of cut rows have been summed over ranks."""
        now, cut = self._now, self._now.products
        rows = [_AGAIN[width][operand] for operand, width in enumerate(self._widths)]
        for dtypes, start, stop in cut.collections:
            collect.collect[(stop - start,)](
                cut.pieces,
                start,
                cut.units,
                cut.strips,
                self.pointers,
                self.hypers,
                self.masks,
                self._blocks.left,
                now.lines,
                now.grams,
                now.of_products,
                now.of_strips,
                now.counters,
                self._blocks.z,
                self._matrices,
                FIRST=number == 0,
                BLOCK_W=self._widths[0],
                ROWS_W=rows[0],
                BLOCK_U=self._widths[1],
                ROWS_U=rows[1],
                COLS=_COLS,
                **state_types(dtypes),
                num_warps=_LANES // 32,
                maxnreg=_OF_COLLECT,
            )

    def orthonormalize(self, number: int, rounds: tuple[int, int]) -> None:
        """Make the next blocks from Z, summed over ranks; note σ₁, the gain, and who goes on."""
        blocks = self._now.products.blocks
        lanes, registers = _ALGEBRA[max(self._widths)]
        orthonormalize.orthonormalize[(len(blocks),)](
            blocks,
            self.masks,
            self.numbers,
            self._blocks.x,
            self._blocks.z,
            self._blocks.left,
            self._kept_z,
            self._kept_left,
            self._factors,
            self._grams,
            ritz.INDEPENDENT * torch.finfo(torch.float32).eps,
            ritz.SETTLED,
            number,
            *rounds,
            self._matrices,
            BLOCK_W=self._widths[0],
            BLOCK_U=self._widths[1],
            LANES=lanes,
            num_warps=8,
            maxnreg=registers,
        )

    def decide_rates(self) -> None:
        """Decide α_W of every matrix, of settled ones it is not used; and how one is projected."""
        decisions.decide_rates[self._grid](
            self.numbers, self.masks, self._matrices, LANES=128, num_warps=1
        )
        if self._projected:
            blocks = self._now.products.blocks
            project.clip[(len(blocks),)](
                blocks,
                self.masks,
                self.numbers,
                self._kept_z,
                self._grams,
                self._changes,
                ROUNDING * ritz.INDEPENDENT * torch.finfo(torch.float32).eps,
                self._matrices,
                BLOCK=self._widths[1],
                num_warps=_OF_CLIP[self._widths[1]],
            )

    def move(self) -> None:
        """Move what waited, at its rate or projected."""
        self._pass(adamw.MOVE.value)
        if not self._projected:
            return
        now, cut = self._now, self._now.products
        for dtypes, start, stop in cut.moves:
            project.project[(stop - start,)](
                cut.pieces,
                start,
                cut.strips,
                self.pointers,
                self.hypers,
                self.masks,
                self.numbers,
                self._kept_left,
                now.lines,
                self._kept_z,
                self._changes,
                now.of_moves,
                self._matrices,
                BLOCK=self._widths[1],
                ROWS=_MOVED[self._widths[1]],
                COLS=_COLS,
                **state_types(dtypes),
                num_warps=_LANES // 32,
                maxnreg=_OF_COLLECT,
            )

    def follow(self) -> None:
        """Let the certificate follow the step."""
        decisions.follow[(self._matrices,)](
            self._now.passes.spans,
            self._now.products.spans,
            self.numbers,
            self.masks,
            self.norms,
            self._now.of_passes,
            self._now.of_moves,
            self._matrices,
            LANES=32,
            num_warps=1,
        )

    @property
    def _grid(self) -> tuple[int]:
        return (-(-self._matrices // 128),)

    def _pass(self, mode: int) -> None:
        cut = self._now.passes
        for dtypes, start, stop in cut.launches:
            adamw.elementwise[(stop - start,)](
                cut.units,
                start,
                self.pointers,
                self.hypers,
                self.masks,
                self.numbers,
                self._now.of_passes,
                self._matrices,
                MODE=mode,
                WIDE=_RUN,
                NARROW=_ENDS,
                GRAD=TYPES[dtypes.weight if mode == adamw.UNDO.value else dtypes.grad],
                **state_types(dtypes),
                num_warps=4,
            )

    def _cut(self, kinds: tuple[units.Dtypes, ...]) -> _Cut:
        """Cut the tables of units."""
        blocks, device = self._blocks, self._blocks.x.device
        bands = [_ROWS[width][operand] for operand, width in enumerate(self._widths)]
        counts = self._measured, self._matrices, kinds, self._programs
        of_passes = passes_of(self._tiles, *counts, device, self._projected)
        cuts = bands, self._widths, kinds, self._programs, _COLS, self._copies
        of_products = units.products(blocks, *cuts)
        count, widest = len(of_products.units), max(self._widths)
        return _Cut(
            of_passes,
            of_products,
            torch.zeros(of_products.lines, device=device),
            torch.zeros(count, widest, widest, device=device),
            torch.zeros(count, 3, device=device),
            torch.zeros(of_products.sums, device=device),
            torch.zeros(of_products.counters, dtype=torch.int32, device=device),
            torch.zeros(len(of_passes.units), 3, device=device),
            torch.zeros(len(of_products.pieces), device=device),
        )


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; on a CPU, where Triton interprets, one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
