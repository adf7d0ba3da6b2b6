"""Which matrices are measured together, and the tables of tiles that kernels read for that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layouts.buffers import Plan
from .spectral.blocks import COLUMNS, MatrixSpec, Operand, Table, table
from .spectral.collectives import Span
from .spectral.seen import Seen
from .spectral.tiles import Tile

#: Elements of the matrices that are measured together on a CPU: what a cache may still hold when it
#: is read again.
_CPU_BATCH = 5 << 18

#: On other devices so many batches at most: each is a few launches.
_DEVICE_BATCHES = 8

#: Columns of a table that say where a tile lies; the others are about its vectors.
_PLACE = 6


def batches_of(plan: Plan, on_host: bool) -> list[list[int]]:
    """Return which matrices are measured together: spread ones all at once, others in turns."""
    spread = [k for k, matrix in enumerate(plan.matrices) if matrix.groups]
    alone = [k for k, matrix in enumerate(plan.matrices) if not matrix.groups]
    size = [matrix.rows * matrix.cols if on_host else matrix.cols for matrix in plan.matrices]
    most = _CPU_BATCH if on_host else -(-sum(size[k] for k in alone) // _DEVICE_BATCHES)
    batches = [spread] if spread else []
    room = 0
    for k in alone:
        if size[k] > room or batches[-1] is spread:
            batches.append([])
            room = most
        batches[-1].append(k)
        room -= size[k]
    return batches


def spans_of(matrices: Sequence[MatrixSpec], width: int) -> dict[int, Span]:
    """Return where the numbers of each spread matrix lie in a vector with ``width`` of each."""
    return {
        k: Span(matrix.groups, width * k, width * (k + 1))
        for k, matrix in enumerate(matrices)
        if matrix.groups
    }


class Tables:
    """The tiles of a plan as tables, replicas included.

    Args:
        plan: what lies where.
        batches: which matrices are measured together.
        operand: the vectors of the updates.
        device: of the vectors.
    """

    def __init__(
        self,
        plan: Plan,
        batches: Sequence[Sequence[int]],
        operand: Operand,
        device: torch.device,
    ) -> None:
        everything = [*plan.tiles, *plan.replicas, *plan.rest]
        self.everything = _table(everything, operand, len(plan.tiles), device)
        self.rest = _table(plan.rest, operand, 0, device)  #: what is no matrix
        self.of_batch: list[Table] = []
        for members in map(set, batches):
            tiles = [tile for tile in plan.tiles if tile.matrix in members]
            tiles.sort(key=lambda tile: tile.matrix)
            replicas = [tile for tile in plan.replicas if tile.matrix in members]
            batch = _table([*tiles, *replicas], operand, len(tiles), device)
            self.of_batch.append(batch)


def tables_of_seen(
    plan: Plan, batches: Sequence[Sequence[int]], seen: Seen, device: torch.device
) -> list[Table]:
    """Return, per batch, the tiles of matrices of which it is kept what the vectors saw, with its
    places; the last column is whether a tile is measured here, and not on another rank.
    """
    columns, tables = COLUMNS.index("counts"), []
    for members in (seen.matrices.intersection(batch) for batch in batches):
        measured = [tile for tile in plan.tiles if tile.matrix in members]
        replicas = [tile for tile in plan.replicas if tile.matrix in members]
        tiles = [*measured, *replicas]
        rows = [seen.operand.row(tile) for tile in tiles]
        for number, row in enumerate(rows):
            row[columns] = int(number < len(measured))
        tables.append(table(rows, device, tiles))
    return tables


def _table(tiles: Sequence[Tile], operand: Operand, measured: int, device: torch.device) -> Table:
    """Return a table of tiles, the first ``measured`` of which have vectors."""
    rows = [operand.row(tile) for tile in tiles[:measured]]
    padding = [0] * (len(COLUMNS) - _PLACE)
    rows += [
        [t.buffer, t.offset, t.rows, t.cols, t.stride, t.matrix, *padding] for t in tiles[measured:]
    ]
    return table(rows, device, list(tiles))
