"""The units of the elementwise passes over a GPU's tensors: runs of elements."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral.tiles import Tile
from .units import UNIT, WAVES, Dtypes, Launch, launches_of, table_of

#: Elements that a unit has at least.
_LEAST_ELEMENTS = 1 << 13


class Passes(NamedTuple):
    """The units of the elementwise passes."""

    units: Tensor  # (units, columns of UNIT)
    launches: list[Launch]
    spans: Tensor  # (matrices, 2): the units that are measured, from the first to behind the last


def passes_of(
    tiles: Sequence[Tile],
    measured: int,
    matrices: int,
    dtypes: Sequence[Dtypes],
    programs: int,
    device: torch.device,
    projected: Collection[int] = (),
) -> Passes:
    """Cut tiles into runs of elements.

    Args:
        tiles: all that is stepped; the first ``measured`` are measured here.
        matrices: how many there are.
        dtypes: by buffer.
        programs: how many run at once.
        device: of the tables.
        projected: the matrices of whose copies, too, the products make M and V.
    """
    total = sum(tile.rows * tile.cols for tile in tiles)
    most = max(_LEAST_ELEMENTS, -(-total // (programs * WAVES)))
    rows: list[tuple[Dtypes, int, list[int]]] = []
    for number, tile in enumerate(tiles):
        is_measured = number < measured
        is_made = int(is_measured or tile.matrix in projected)
        for offset, count, cols in _runs(tile, most):
            place = [tile.buffer, offset, count, cols, tile.stride, tile.matrix, is_made]
            rows.append((dtypes[tile.buffer], tile.matrix if is_measured else -1, place))
    rows.sort(key=lambda row: (str(row[0]), row[1]))
    spans = [[0, 0] for _ in range(matrices)]
    for at, (_, matrix, _) in enumerate(rows):
        if matrix >= 0:
            spans[matrix] = [spans[matrix][0] if spans[matrix][1] else at, at + 1]
    padding = [0] * (len(UNIT) - UNIT.index("operand"))
    return Passes(
        table_of([[*place, *padding] for _, _, place in rows], len(UNIT), device),
        launches_of(row[0] for row in rows),
        table_of(spans, 2, device),
    )


def _runs(tile: Tile, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield where a unit's first row begins, rows and columns: a dense tile is one run."""
    if tile.stride == tile.cols or tile.rows == 1:
        size = tile.rows * tile.cols
        step = min(most, size)
        step = -(-step // 8) * 8
        for start in range(0, size, step):
            yield tile.offset + start, 1, min(step, size - start)
        return
    step = max(1, most // tile.cols)
    for row in range(0, tile.rows, step):
        yield tile.offset + row * tile.stride, min(step, tile.rows - row), tile.cols
