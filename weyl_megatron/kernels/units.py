"""Tables of units: what one program of a GPU works on, cut by how many run at once. Those of the
products; passes.py has the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral.blocks import Blocks, Operand
from ..spectral.tiles import Tile


class Dtypes(NamedTuple):
    """What tells the launches apart that tensors take: the dtypes of W, G, M and V."""

    weight: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype


#: Columns of a table of units, int64: the buffer, where its first row begins there, rows, columns
#: and the distance between rows; the matrix (-1: none); whether the products make its M and V here.
UNIT = (
    "buffer",
    "offset",
    "rows",
    "cols",
    "stride",
    "matrix",
    "made",
    # Of products only: 0 is W and 1 is U; where its columns of X begin; the matrix's columns n;
    # which of those is its first; where its Y lie in ``lines``, or in ``left`` (-1: it has whole
    # rows); b.
    "operand",
    "x",
    "n",
    "col",
    "line",
    "left",
    "width",
)

#: Columns of a table of the pieces of Z and YᵀY, int64: the operand, the matrix, where its Z
#: begins, n, b. Of Z: the first column, the strip of rows that is summed, how many strips there
#: are, the how-manieth it is, where what they sum lies, and where they are counted. Of YᵀY (the
#: first column is -1): the units from the first to behind the last, of which those from ``cut`` on
#: have cut rows.
PIECE = (
    "operand",
    "matrix",
    "z",
    "n",
    "width",
    "start",
    "strip",
    "strips",
    "number",
    "sums",
    "counter",
    "first",
    "last",
    "cut",
)

#: Columns of a table of blocks, int64: the operand, the matrix, where X and Z begin, n, b, where
#: its Y in ``left`` begin and how many numbers they are.
BLOCK = ("operand", "matrix", "x", "z", "n", "width", "left", "lefts")

#: Waves of programs where each sums little: what ends late is short.
WAVES = 4

#: What an element of U takes beside one of W, in bytes that are read and written: 8 beside 4, and
#: 20 in the first iteration.
_OF_UPDATE = 3

#: What it takes to read it again.
_OF_UPDATE_AGAIN = 2

#: Rows that a strip has at least, where there are so many.
_LEAST_STRIP = 32

#: Units and strips of one matrix at most, whose sums are added up one after the other.
_MOST_UNITS = 128


class Launch(NamedTuple):
    """Units that one launch works on: ``[start, stop)`` of a table."""

    dtypes: Dtypes
    start: int
    stop: int


class Products(NamedTuple):
    """The units of the products, those of U before those of W in every launch, and the pieces of Z
    that are made of their Y.
    """

    units: Tensor
    launches: list[Launch]  # of both operands
    of_update: list[Launch]  # of U alone
    strips: Tensor  # (strips, columns of UNIT): rows that are summed together
    pieces: Tensor  # (pieces, columns of PIECE)
    collections: list[Launch]
    moves: list[Launch]  # the pieces of U's Z alone
    spans: Tensor  # (matrices, 2): which pieces these are, from the first to behind the last
    blocks: Tensor  # (operands · matrices, columns of BLOCK)
    lines: int  # numbers of Y that are kept
    sums: int  # of Z that strips sum
    counters: int  # of strips that are done


class _Unit(NamedTuple):
    """Rows of a tile, of one operand."""

    dtypes: Dtypes
    operand: int
    matrix: int
    is_cut: bool
    tile: Tile
    row: int
    rows: int
    line: int  # where its Y lie


def products(
    blocks: Blocks,
    bands: Sequence[int],
    padded: Sequence[int],
    dtypes: Sequence[Dtypes],
    programs: int,
    cols: int,
    copies: Sequence[Tile] = (),
) -> Products:
    """Cut the tiles of W (operand 0) and U (operand 1) into units and strips of rows.

    Args:
        blocks: resident.
        bands: for each operand, how many rows a program multiplies at once.
        padded: for each operand, the numbers of Y that are kept of a row.
        dtypes: by buffer.
        programs: how many run at once.
        cols: how many columns of Z a program sums.
        copies: pieces of projected matrices that another rank measures: M, V and Y are made here,
            too, and count for nothing.
    """
    device = blocks.x.device
    lists = [[*operand.whole[0].tiles, *operand.cut[0].tiles] for operand in blocks.operands]
    lists[1] += copies
    lines, room = _lines(lists, padded)
    units: list[_Unit] = []
    strips: list[_Unit] = []
    of_copies: tuple[list[_Unit], list[_Unit]] = [], []
    shares = _shares(lists, (1, _OF_UPDATE), programs)
    of_strips = _shares(lists, (1, _OF_UPDATE_AGAIN), programs * WAVES)
    for number, tiles in enumerate(lists):
        for at, (tile, line) in enumerate(zip(tiles, lines[number], strict=True)):
            shape = blocks.matrices[tile.matrix]
            kinds, is_cut = dtypes[tile.buffer], tile.cols < shape.cols
            whole = _Unit(kinds, number, tile.matrix, is_cut, tile, 0, tile.rows, line)
            is_copy = number == 1 and at >= len(tiles) - len(copies)
            to_units, to_strips = of_copies if is_copy else (units, strips)
            least = max(1, -(-shape.rows // _MOST_UNITS))
            rows = max(least, shares[number] // tile.cols)
            # Y of a copy's cut rows are those that the ranks sum: what is made of them here is not.
            made = whole._replace(is_cut=is_cut and not is_copy)
            to_units += _split(made, -(-rows // bands[number]) * bands[number], padded[number])
            rows = max(least, _LEAST_STRIP, of_strips[number] // cols)
            to_strips += _split(whole, rows, padded[number])
    # A matrix's are together, and the largest begin first, so that small ones fill up the end.
    largest: dict[tuple[int, int], int] = {}
    for unit in [*units, *of_copies[0]]:
        key = unit.operand, unit.matrix
        largest[key] = max(largest.get(key, 0), unit.rows * unit.tile.cols)
    for cut in units, strips, *of_copies:
        cut.sort(
            key=lambda unit: (
                str(unit.dtypes),
                -unit.operand,
                -largest[unit.operand, unit.matrix],
                unit.matrix,
                unit.is_cut,
            )
        )
    pieces, sums, counters = _pieces(blocks, units, strips, cols, dtypes)
    all_pieces = [*pieces, *_copied_pieces(blocks, of_copies[1], len(strips), cols)]
    units, strips = units + of_copies[0], strips + of_copies[1]
    blocks_of = [
        _block_row(operand, number, k, blocks)
        for number, operand in reversed(list(enumerate(blocks.operands)))
        for k in range(len(blocks.matrices))
    ]
    return Products(
        table_of([_unit_row(unit, blocks) for unit in units], len(UNIT), device),
        launches_of(unit.dtypes for unit in units),
        launches_of((unit.dtypes for unit in units), [unit.operand == 1 for unit in units]),
        table_of([_unit_row(strip, blocks) for strip in strips], len(UNIT), device),
        table_of([row for _, row in all_pieces], len(PIECE), device),
        launches_of(kinds for kinds, _ in pieces),
        launches_of(
            (kinds for kinds, _ in all_pieces), [_is_of_update(row) for _, row in all_pieces]
        ),
        table_of(_move_spans([row for _, row in pieces], len(blocks.matrices)), 2, device),
        table_of(blocks_of, len(BLOCK), device),
        room,
        sums,
        counters,
    )


def _lines(lists: Sequence[Sequence[Tile]], padded: Sequence[int]) -> tuple[list[list[int]], int]:
    """Return where the Y of each tile of each operand begin, and how many numbers they are."""
    room = 0
    places: list[list[int]] = []
    for tiles, width in zip(lists, padded, strict=True):
        places.append([])
        for tile in tiles:
            places[-1].append(room)
            room += tile.rows * width
    return places, room


def _shares(lists: Sequence[Sequence[Tile]], weights: Sequence[int], programs: int) -> list[int]:
    """Return how many elements of each operand a program has."""
    total = sum(w * t.rows * t.cols for w, tiles in zip(weights, lists, strict=True) for t in tiles)
    return [-(-total // programs) // weight for weight in weights]


def _split(whole: _Unit, most: int, padded: int) -> Iterator[_Unit]:
    """Yield so many rows of a tile at a time."""
    for row in range(0, whole.rows, most):
        rows = min(most, whole.rows - row)
        yield whole._replace(row=row, rows=rows, line=whole.line + row * padded)


def _unit_row(unit: _Unit, blocks: Blocks) -> list[int]:
    operand, tile = blocks.operands[unit.operand], unit.tile
    width, n = operand.widths[unit.matrix], blocks.matrices[unit.matrix].cols
    left = operand.left_place(tile) + unit.row * width if unit.is_cut else -1
    offset = tile.offset + unit.row * tile.stride
    where = [tile.buffer, offset, unit.rows, tile.cols, tile.stride, unit.matrix, 1]
    x = operand.x_at[unit.matrix] + tile.col
    return [*where, unit.operand, x, n, tile.col, unit.line, left, width]


def _pieces(
    blocks: Blocks,
    units: Sequence[_Unit],
    strips: Sequence[_Unit],
    cols: int,
    dtypes: Sequence[Dtypes],
) -> tuple[list[tuple[Dtypes, list[int]]], int, int]:
    """Return the pieces of every matrix's Z and YᵀY with their dtypes, those of U first; how many
    numbers strips sum, and in how many places they are counted.
    """
    rows: list[tuple[Dtypes, list[int]]] = []
    of_units, of_strips = _spans(units), _spans(strips)
    sums = counters = 0
    for number, operand in reversed(list(enumerate(blocks.operands))):
        for k, matrix in enumerate(blocks.matrices):
            first, last = of_units.get((number, k), (0, 0))
            cut = next((at for at in range(first, last) if units[at].is_cut), last)
            kinds = units[first].dtypes if first < last else dtypes[0]
            head = [number, k, operand.z_at[k], matrix.cols, operand.widths[k]]
            rows.append((kinds, [*head, -1, 0, 0, 0, 0, 0, first, last, cut]))
            begin, end = of_strips.get((number, k), (0, 0))
            count = end - begin
            for col in range(0, matrix.cols, cols):
                # Of nothing, where this rank has no rows: zeros.
                for strip in range(begin, max(end, begin + 1)):
                    where = [strip, count, strip - begin, sums, counters]
                    rows.append((kinds, [*head, col, *where, 0, 0, 0]))
                counters += 1
            if count > 1:
                sums += -(-count * operand.widths[k] * matrix.cols // 4) * 4
    rows.sort(key=lambda row: (str(row[0]), row[1][PIECE.index("start")] >= 0))
    return rows, sums, counters


def _copied_pieces(
    blocks: Blocks, strips: Sequence[_Unit], first: int, cols: int
) -> list[tuple[Dtypes, list[int]]]:
    """Return, with their dtypes, the pieces of Z by which copies move: nothing is summed of them.

    Args:
        blocks: resident.
        strips: of copies.
        first: the number of the first of them.
        cols: of a piece.
    """
    rows: list[tuple[Dtypes, list[int]]] = []
    for at, strip in enumerate(strips, first):
        operand, k = blocks.operands[strip.operand], strip.matrix
        n = blocks.matrices[k].cols
        head = [strip.operand, k, operand.z_at[k], n, operand.widths[k]]
        nothing = [0] * (len(PIECE) - PIECE.index("number"))
        rows += [(strip.dtypes, [*head, col, at, 1, *nothing]) for col in range(0, n, cols)]
    return rows


def _is_of_update(piece: Sequence[int]) -> bool:
    """Whether it is a piece of U's Z."""
    return piece[PIECE.index("operand")] == 1 and piece[PIECE.index("start")] >= 0


def _move_spans(pieces: Sequence[Sequence[int]], matrices: int) -> list[list[int]]:
    """Return where the pieces of each matrix's Z of U are: the first and behind the last."""
    spans = [[0, 0] for _ in range(matrices)]
    for at, piece in enumerate(pieces):
        if _is_of_update(piece):
            span = spans[piece[PIECE.index("matrix")]]
            span[:] = [span[0] if span[1] else at, at + 1]
    return spans


def _spans(units: Sequence[_Unit]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return where the units of each operand's matrix are: the first and behind the last."""
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    for at, unit in enumerate(units):
        key = unit.operand, unit.matrix
        spans[key] = spans.get(key, (at, at))[0], at + 1
    return spans


def _block_row(operand: Operand, number: int, k: int, blocks: Blocks) -> list[int]:
    n, width = blocks.matrices[k].cols, operand.widths[k]
    lefts = width * len(blocks.cut[k])
    places = [operand.x_at[k], operand.z_at[k], n, width, operand.left_at[k], lefts]
    return [number, k, *places]


def launches_of(kinds: Iterable[Dtypes], chosen: Sequence[bool] | None = None) -> list[Launch]:
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


def table_of(rows: list[list[int]], columns: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, columns).to(device)
