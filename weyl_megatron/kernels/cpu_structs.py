"""The structs that the compiled kernel reads by address: cpu_step/tables.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..rule import NOTHING, ROUNDING, SUMS, UNSEEN
from ..spectral.blocks import Blocks, Table
from ..spectral.ritz import INDEPENDENT
from .clipping import Clipping
from .stepped import Hyper

#: The struct Hyper: ten floats and two doubles.
HYPER_BYTES = 56


def columns_of(table: Table) -> tuple[Tensor, int]:
    return table.columns, len(table.tiles)


def hyper_bytes(hyper: Hyper) -> bytes:
    """Return the struct Hyper."""
    lr, beta1, beta2, eps, weight_decay, correction1, correction2 = hyper.numbers()
    root = correction2**0.5
    moments = 1 - beta1, beta2, 1 - beta2, root, eps
    scheduled = 1 - lr * weight_decay, -(lr / correction1)
    inverse = 1 / float(torch.tensor(root, dtype=torch.float32))  # of the root that it is given
    direction = correction1 / root, inverse, eps * correction1
    floats = [*moments, *scheduled, *direction]
    return bytes((ctypes.c_float * 10)(*floats)) + bytes(
        (ctypes.c_double * 2)(weight_decay, correction1)
    )


class Structs:
    """The structs Batch and Clipping of the same blocks; each is made once."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._batches: dict[int, Tensor] = {}
        self._clipping: tuple[Clipping, Tensor] | None = None
        self._kept_alive: list[list[Tensor | int]] = []  # what the addresses point to

    def of_batch(
        self, batch: int, table: Table, results: tuple[Tensor, Tensor], clipping: Clipping | None
    ) -> Tensor:
        """Return the struct Batch.

        Args:
            batch: its number.
            table: all its tiles.
            results: what becomes σ₁ and what its last iteration gained, ``(2, matrices)``.
            clipping: always the same.
        """
        if batch not in self._batches:
            self._batches[batch] = self._batch(batch, table, results, clipping)
        return self._batches[batch]

    def of_clipping(self, clipping: Clipping) -> Tensor:
        """Return the struct Clipping."""
        if self._clipping is None or self._clipping[0] is not clipping:
            self._clipping = clipping, self._clipping_of(clipping)
        return self._clipping[1]

    def _batch(
        self, batch: int, table: Table, results: tuple[Tensor, Tensor], clipping: Clipping | None
    ) -> Tensor:
        blocks, members = self._blocks, torch.tensor(self._blocks.batches[batch])
        sigma, gain = results
        fields: list[Tensor | int] = []
        for number, operand in enumerate(blocks.operands):
            kept, working = operand.kept[batch], operand.working[batch]
            fields += [*columns_of(operand.whole[batch]), *columns_of(operand.cut[batch])]
            fields += [operand.shape, kept, int(kept.dtype == torch.float32), working, len(kept)]
            fields += [sigma[number], gain[number]]
        fields += [*columns_of(table), members, len(members), blocks.x, blocks.z, blocks.left]
        fields += [blocks.z_sizes[batch], blocks.left_sizes[batch]]
        if clipping is None:
            fields += [0] * 6
        else:
            whole = blocks.operands[clipping.seen.number].whole[batch]
            fields += [*columns_of(clipping.tables[batch])]
            fields += _lines(whole, table, clipping.tables[batch], clipping)
        return self._struct(fields)

    def _clipping_of(self, clipping: Clipping) -> Tensor:
        """Return the struct Clipping."""
        seen, source = clipping.seen, self._blocks.operands[clipping.seen.number]
        operand, shapes, lefts = seen.operand, [], []
        for k, matrix in enumerate(operand.matrices):
            width, z = operand.widths[k], operand.z_at[k]
            shapes.append([operand.x_at[k], z, matrix.cols, width, z + width * matrix.cols])
            length = width * len(self._blocks.cut[k])
            lefts.append([source.left_at[k], operand.left_at[k], length])
        eps = torch.finfo(seen.z.dtype).eps
        constants = torch.tensor(
            [UNSEEN, INDEPENDENT * ROUNDING * eps, NOTHING, SUMS], dtype=torch.float64
        )
        return self._struct(
            [
                *(clipping.is_projected, clipping.is_whole),
                *(torch.tensor(shapes), torch.tensor(lefts)),
                *(seen.x, seen.z, seen.left),
                *(clipping.rate, clipping.decay, clipping.unseen, clipping.share),
                *(clipping.clipped, clipping.is_active, constants),
            ]
        )

    def _struct(self, fields: list[Tensor | int]) -> Tensor:
        self._kept_alive.append(fields)
        return torch.tensor(
            [each.data_ptr() if isinstance(each, Tensor) else each for each in fields]
        )


def _lines(whole: Table, table: Table, seen: Table, clipping: Clipping) -> list[Tensor | int]:
    """Return how long Y of a batch's projected matrices are, of the rows that are measured here and
    whole, and where those of each tile of three tables begin (-1: nowhere): all, seen, whole.
    """
    places: dict[tuple[int, int], int] = {}
    room = 0
    for tile in whole.tiles:
        if tile.matrix in clipping.seen.matrices:
            places[tile.buffer, tile.offset] = room
            room += tile.rows * clipping.seen.operand.widths[tile.matrix]
    lines = [
        torch.tensor([places.get((tile.buffer, tile.offset), -1) for tile in each.tiles])
        for each in (table, seen, whole)
    ]
    return [room, *lines]
