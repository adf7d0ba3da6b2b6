"""The step in plain torch: any device, any dtype; what the fused kernels are held to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral.blocks import COLUMNS, Blocks, Table
from ..spectral.power import TorchProducts, multiply_band, rows_of
from ..spectral.seen import Seen
from ..spectral.tiles import Tile
from .stepped import Stepped, flat
from .torch_adamw import adamw_direction, adamw_moments, adamw_move, adamw_undo

#: Elements that are worked on at once: U is formed anew wherever it is needed and never stored
#: whole.
_BAND = 1 << 20


class PlainKernel:
    """See :class:`.Kernel`."""

    name = "torch"

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        # Of the step that is made: the products read them from here.
        self._weights: list[Tensor] = []
        self._stepped: list[Stepped | None] = []
        weights_of = partial(_weights_of, self._weights)
        updates_of = partial(_updates_of, self._weights, self._stepped)
        products = TorchProducts(blocks, [weights_of, updates_of])
        self.multiply, self.multiply_back = products.multiply, products.multiply_back
        self.orthonormalize = products.orthonormalize

    def bind(self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None]) -> None:
        self._weights[:] = [flat(weight) for weight in weights]
        pairs = zip(weights, stepped, strict=True)
        self._stepped[:] = [
            state and _flat(state.in_dtype(weight.dtype)) for weight, state in pairs
        ]

    def release(self) -> None:
        self._weights.clear()
        self._stepped.clear()

    def step(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        for tile, stepped, is_measured in self._chosen(table, mask, rest=True):
            hyper, k = stepped.hyper, tile.matrix
            for band in _bands(self._weights, tile, stepped):
                adamw_moments(band.grad, band.exp_avg, band.exp_avg_sq, band.largest, hyper)
                first, second = band.moments()
                if is_measured:
                    sums[k, 0] += _squares(adamw_direction(first, second, hyper))
                    sums[k, 1] += _squares(band.weight)
                adamw_move(band.weight, first, second, hyper, hyper.lr)
                if is_measured:
                    sums[k, 2] += _squares(band.weight)

    def moments(self, table: Table, mask: Tensor, sums: Tensor) -> None:
        for tile, stepped, is_measured in self._chosen(table, mask):
            for band in _bands(self._weights, tile, stepped):
                adamw_moments(band.grad, band.exp_avg, band.exp_avg_sq, band.largest, stepped.hyper)
                if is_measured:
                    update = adamw_direction(*band.moments(), stepped.hyper)
                    sums[tile.matrix, 0] += _squares(update)
                    multiply_band(self._blocks.operands[1], tile, band.row, update)

    def undo(self, table: Table, mask: Tensor) -> None:
        for tile, stepped, _ in self._chosen(table, mask):
            for band in _bands(self._weights, tile, stepped):
                adamw_undo(band.weight, *band.moments(), stepped.hyper, stepped.hyper.lr)

    def move(self, table: Table, mask: Tensor, rates: Tensor, sums: Tensor) -> None:
        chosen, is_measured, rate_of = _read(mask, _is_measured(table), rates)
        for tile, stepped, measured in self._tiles(table, chosen, is_measured):
            lr = stepped.hyper.lr
            rate: float | Tensor = rate_of[tile.matrix]
            if isinstance(lr, Tensor) and rate == float(lr):
                rate = lr  # which torch's AdamW rounds in another way than a number
            for band in _bands(self._weights, tile, stepped):
                adamw_move(band.weight, *band.moments(), stepped.hyper, rate)
                if measured:
                    sums[tile.matrix, 2] += _squares(band.weight)

    def project(
        self, table: Table, mask: Tensor, rates: Sequence[Tensor], sums: Tensor, seen: Seen
    ) -> None:
        counts = table.columns[:, COLUMNS.index("counts")]
        chosen, measured, of_update, of_decay = _read(mask, counts, *rates)
        for tile, stepped, is_measured in self._tiles(table, chosen, measured):
            k, hyper = tile.matrix, stepped.hyper
            for band in _bands(self._weights, tile, stepped):
                update = adamw_direction(*band.moments(), hyper)
                change = seen.change(tile, band.row, update.to(seen.x.dtype))
                change = change + of_update[k] * update
                if hyper.weight_decay != 0:
                    band.weight.mul_(1 - of_decay[k] * hyper.weight_decay)
                band.weight.sub_(change)
                if is_measured:
                    sums[k, 2] += _squares(band.weight)

    def _chosen(
        self, table: Table, mask: Tensor, *, rest: bool = False
    ) -> Iterator[tuple[Tile, Stepped, bool]]:
        """Yield the tiles of a mask that have gradients, and whether they are measured here."""
        chosen, is_measured = _read(mask, _is_measured(table))
        return self._tiles(table, chosen, is_measured, rest=rest)

    def _tiles(
        self,
        table: Table,
        chosen: Sequence[float],
        is_measured: Sequence[float],
        *,
        rest: bool = False,
    ) -> Iterator[tuple[Tile, Stepped, bool]]:
        for tile, measured in zip(table.tiles, is_measured, strict=True):
            stepped = self._stepped[tile.buffer]
            if stepped is not None and (rest if tile.matrix < 0 else chosen[tile.matrix]):
                yield tile, stepped, bool(measured)


def _is_measured(table: Table) -> Tensor:
    """Return of each tile whether it has vectors here."""
    return table.columns[:, COLUMNS.index("width")] > 0


def _read(*vectors: Tensor) -> list[list[float]]:
    """Return the numbers of vectors, all in one read, for which the host waits for the device."""
    numbers = torch.cat([vector.double() for vector in vectors]).tolist()
    ends = accumulate(len(vector) for vector in vectors)
    return [numbers[end - len(v) : end] for end, v in zip(ends, vectors, strict=True)]


def _weights_of(weights: Sequence[Tensor], tile: Tile) -> Iterator[tuple[int, Tensor]]:
    for row, rows in _rows(tile):
        yield row, rows_of(weights[tile.buffer], tile, row, rows)


def _updates_of(
    weights: Sequence[Tensor], all_stepped: Sequence[Stepped | None], tile: Tile
) -> Iterator[tuple[int, Tensor]]:
    stepped = all_stepped[tile.buffer]
    if stepped is not None:
        for band in _bands(weights, tile, stepped):
            yield band.row, adamw_direction(*band.moments(), stepped.hyper)


class _Band(NamedTuple):
    """Rows of a tile: the first one's number, and W, G, M and V of them, ``(rows, cols)`` each."""

    row: int
    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    largest: Tensor | None  # the largest V so far, where it counts (amsgrad)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return what U is made of: as it is stored, in W's dtype, or, where it is another, in
        float32 at least.
        """
        second = self.exp_avg_sq if self.largest is None else self.largest
        if self.exp_avg.dtype == second.dtype == self.weight.dtype:
            return self.exp_avg, second
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self.exp_avg.to(wide), second.to(wide)


def _bands(weights: Sequence[Tensor], tile: Tile, stepped: Stepped) -> Iterator[_Band]:
    """Yield a tile band by band."""
    tensors = weights[tile.buffer], stepped.grad, stepped.exp_avg, stepped.exp_avg_sq
    largest = stepped.max_exp_avg_sq
    for row, rows in _rows(tile):
        weight, grad, exp_avg, exp_avg_sq = (rows_of(tensor, tile, row, rows) for tensor in tensors)
        of_rows = None if largest is None else rows_of(largest, tile, row, rows)
        yield _Band(row, weight, grad, exp_avg, exp_avg_sq, of_rows)


def _flat(stepped: Stepped) -> Stepped:
    largest = stepped.max_exp_avg_sq
    return Stepped(
        flat(stepped.grad),
        flat(stepped.exp_avg),
        flat(stepped.exp_avg_sq),
        stepped.hyper,
        None if largest is None else flat(largest),
    )


def _rows(tile: Tile) -> Iterator[tuple[int, int]]:
    step = max(1, _BAND // tile.cols)
    for row in range(0, tile.rows, step):
        yield row, min(step, tile.rows - row)


def _squares(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(
        tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)
    )
    return norm.double().square()
