"""Tables of units: what one program of a GPU works on, cut by how many run at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral.blocks import Blocks, Operand
from ..spectral.tiles import Tile

#: What tells the launches apart that tensors take: the dtype of W, M and V, and that of G.
Dtypes = tuple[torch.dtype, torch.dtype]

#: Columns of a table of units, int64: the buffer, where its first row begins there, rows, columns
#: and the distance between rows; the matrix (-1: none); whether it is measured here.
UNIT = (
    "buffer",
    "offset",
    "rows",
    "cols",
    "stride",
    "matrix",
    "measured",
    # Of products only: 0 is W and 1 is U; where its columns of X begin; the matrix's columns n;
    # where what it sums lies, where its columns of Z begin from there; where its Y lie in ``left``
    # (-1: it has whole rows).
    "operand",
    "x",
    "n",
    "place",
    "col",
    "left",
    "width",
)

#: Columns of a table of the pieces of Z that are added up, int64: the operand, the matrix, where
#: its Z begins, n, b, the first column, where the places of its units with whole rows begin, how
#: many there are and how far they are apart; its units from the first to behind the last, of
#: whole rows and of any; which of those have cut rows.
PIECE = (
    "operand",
    "matrix",
    "z",
    "n",
    "width",
    "start",
    "place",
    "count",
    "apart",
    "first",
    "last",
    "cut",
)

#: Columns of a table of blocks, int64: the operand, the matrix, where X and Z begin, n, b, where
#: its Y in ``left`` begin and how many numbers they are.
BLOCK = ("operand", "matrix", "x", "z", "n", "width", "left", "lefts")

#: Elements that a unit of an elementwise pass has at least.
_LEAST_ELEMENTS = 1 << 13

#: Waves of programs in an elementwise pass, which sums little: what ends late is short.
_WAVES = 4

#: What an element of U takes beside one of W, in bytes that are read and written: 8 beside 4, and
#: 20 in the first iteration.
_OF_UPDATE = 3

#: Units of one matrix at most, whose sums are added up one after the other.
_MOST_UNITS = 128


class Launch(NamedTuple):
    """Units that one launch works on: ``[start, stop)`` of a table."""

    dtypes: Dtypes
    start: int
    stop: int


class Passes(NamedTuple):
    """The units of the elementwise passes."""

    units: Tensor  # (units, columns of UNIT)
    launches: list[Launch]
    spans: Tensor  # (matrices, 2): the units that are measured, from the first to behind the last


class Products(NamedTuple):
    """The units of the products, those of U before those of W in every launch, and what adds up
    their sums.
    """

    units: Tensor
    launches: list[Launch]  # of both operands
    of_update: list[Launch]  # of U alone
    pieces: Tensor  # (pieces, columns of PIECE)
    collections: list[Launch]
    blocks: Tensor  # (operands · matrices, columns of BLOCK)
    room: int  # of what units sum


def passes(
    tiles: Sequence[Tile],
    measured: int,
    matrices: int,
    dtypes: Sequence[Dtypes],
    programs: int,
    device: torch.device,
) -> Passes:
    """Cut tiles into runs of elements.

    Args:
        tiles: all that is stepped; the first ``measured`` are measured here.
        matrices: how many there are.
        dtypes: by buffer.
        programs: how many run at once.
        device: of the tables.
    """
    total = sum(tile.rows * tile.cols for tile in tiles)
    most = max(_LEAST_ELEMENTS, -(-total // (programs * _WAVES)))
    rows: list[tuple[Dtypes, int, list[int]]] = []
    for number, tile in enumerate(tiles):
        is_measured = int(number < measured)
        for offset, count, cols in _runs(tile, most):
            place = [tile.buffer, offset, count, cols, tile.stride, tile.matrix, is_measured]
            rows.append((dtypes[tile.buffer], tile.matrix if is_measured else -1, place))
    rows.sort(key=lambda row: (str(row[0]), row[1]))
    spans = [[0, 0] for _ in range(matrices)]
    for at, (_, matrix, _) in enumerate(rows):
        if matrix >= 0:
            spans[matrix] = [spans[matrix][0] if spans[matrix][1] else at, at + 1]
    padding = [0] * (len(UNIT) - UNIT.index("operand"))
    return Passes(
        _table([[*place, *padding] for _, _, place in rows], len(UNIT), device),
        _launches(row[0] for row in rows),
        _table(spans, 2, device),
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


class _Unit(NamedTuple):
    """A band of a tile's rows, of one operand."""

    dtypes: Dtypes
    operand: int
    matrix: int
    is_cut: bool
    tile: Tile
    row: int
    rows: int


def products(
    blocks: Blocks,
    bands: Sequence[int],
    dtypes: Sequence[Dtypes],
    programs: int,
    cols: int,
) -> Products:
    """Cut the tiles of W (operand 0) and U (operand 1) into bands of rows.

    Args:
        blocks: resident.
        bands: for each operand, how many rows a program multiplies at once.
        dtypes: by buffer.
        programs: how many run at once.
        cols: how many columns of Z are added up at once.
    """
    device = blocks.x.device
    weight = (1, _OF_UPDATE)
    lists = [[*operand.whole[0].tiles, *operand.cut[0].tiles] for operand in blocks.operands]
    total = sum(w * t.rows * t.cols for w, tiles in zip(weight, lists, strict=True) for t in tiles)
    units: list[_Unit] = []
    longest: dict[tuple[int, int], int] = {}  # rows of a unit, of each operand's matrix
    for number, tiles in enumerate(lists):
        most = max(1, -(-total // programs) // weight[number])
        for tile in tiles:
            shape = blocks.matrices[tile.matrix]
            rows = max(1, most // tile.cols, -(-shape.rows // _MOST_UNITS))
            rows = -(-rows // bands[number]) * bands[number]
            is_cut = tile.cols < shape.cols
            if not is_cut:
                key = number, tile.matrix
                longest[key] = max(longest.get(key, 0), min(rows, tile.rows))
            for row in range(0, tile.rows, rows):
                count = min(rows, tile.rows - row)
                kinds = dtypes[tile.buffer]
                units.append(_Unit(kinds, number, tile.matrix, is_cut, tile, row, count))
    # A matrix's are together, and the largest begin first, so that small ones fill up the end.
    largest: dict[tuple[int, int], int] = {}
    for unit in units:
        key = unit.operand, unit.matrix
        largest[key] = max(largest.get(key, 0), unit.rows * unit.tile.cols)
    units.sort(
        key=lambda unit: (
            str(unit.dtypes),
            -unit.operand,
            -largest[unit.operand, unit.matrix],
            unit.matrix,
            unit.is_cut,
        )
    )
    places: list[int] = []
    apart: dict[tuple[int, int], int] = {}
    room = 0
    for unit in units:
        operand = blocks.operands[unit.operand]
        key, b = (unit.operand, unit.matrix), operand.widths[unit.matrix]
        places.append(room)
        if not unit.is_cut:  # Z, YᵀY and Y, from a multiple of four on
            length = b * (blocks.matrices[unit.matrix].cols + b + longest[key])
            apart[key] = -(-length // 4) * 4
            room += apart[key]
    rows_of_units = [
        _unit_row(unit, blocks.operands[unit.operand], place)
        for unit, place in zip(units, places, strict=True)
    ]
    pieces, collections = _pieces(blocks, units, places, apart, cols, dtypes)
    blocks_of = [
        _block_row(operand, number, k, blocks)
        for number, operand in reversed(list(enumerate(blocks.operands)))
        for k in range(len(blocks.matrices))
    ]
    return Products(
        _table(rows_of_units, len(UNIT), device),
        _launches(unit.dtypes for unit in units),
        _launches((unit.dtypes for unit in units), [unit.operand == 1 for unit in units]),
        _table(pieces, len(PIECE), device),
        collections,
        _table(blocks_of, len(BLOCK), device),
        room,
    )


def _unit_row(unit: _Unit, operand: Operand, place: int) -> list[int]:
    tile, width = unit.tile, operand.widths[unit.matrix]
    left = operand.left_place(tile) + unit.row * width if unit.is_cut else -1
    n = operand.matrices[unit.matrix].cols
    offset = tile.offset + unit.row * tile.stride
    where = [tile.buffer, offset, unit.rows, tile.cols, tile.stride, unit.matrix, 1]
    x = operand.x_at[unit.matrix] + tile.col
    return [*where, unit.operand, x, n, place, tile.col, left, width]


def _pieces(
    blocks: Blocks,
    units: Sequence[_Unit],
    places: Sequence[int],
    apart: dict[tuple[int, int], int],
    cols: int,
    dtypes: Sequence[Dtypes],
) -> tuple[list[list[int]], list[Launch]]:
    """Return the pieces of every matrix's Z, and which are launched together."""
    first: dict[tuple[int, int], int] = {}
    last: dict[tuple[int, int], int] = {}
    cut: dict[tuple[int, int], int] = {}
    for at, unit in enumerate(units):
        key = unit.operand, unit.matrix
        first.setdefault(key, at)
        last[key] = at + 1
        if unit.is_cut:
            cut.setdefault(key, at)
    rows: list[tuple[Dtypes, list[int]]] = []
    for number, operand in enumerate(blocks.operands):
        for k, matrix in enumerate(blocks.matrices):
            key = number, k
            start, stop = first.get(key, 0), last.get(key, 0)
            whole_stop = cut.get(key, stop)
            kinds = units[start].dtypes if stop else dtypes[0]
            place = places[start] if stop else 0
            head = [number, k, operand.z_at[k], matrix.cols, operand.widths[k]]
            tail = [place, whole_stop - start, apart.get(key, 0), start, stop, whole_stop]
            rows += [(kinds, [*head, col, *tail]) for col in range(0, matrix.cols, cols)]
            rows.append((kinds, [*head, -1, *tail]))
    rows.sort(key=lambda row: str(row[0]))
    return [row for _, row in rows], _launches(kinds for kinds, _ in rows)


def _block_row(operand: Operand, number: int, k: int, blocks: Blocks) -> list[int]:
    n, width = blocks.matrices[k].cols, operand.widths[k]
    lefts = width * len(blocks.cut[k])
    places = [operand.x_at[k], operand.z_at[k], n, width, operand.left_at[k], lefts]
    return [number, k, *places]


def _launches(kinds: Iterable[Dtypes], chosen: Sequence[bool] | None = None) -> list[Launch]:
    """Return the runs of units of equal dtypes, of those that are chosen."""
    launches: list[Launch] = []
    for at, dtypes in enumerate(kinds):
        if chosen is not None and not chosen[at]:
            continue
        if launches and launches[-1].dtypes == dtypes and launches[-1].stop == at:
            launches[-1] = launches[-1]._replace(stop=at + 1)
        else:
            launches.append(Launch(dtypes, at, at + 1))
    return launches


def _table(rows: list[list[int]], columns: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, columns).to(device)
