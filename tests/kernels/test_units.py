"""What programs of a GPU work on: everything once, in places of their own, however deep a model
is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weyl_megatron.kernels import passes, units
from weyl_megatron.kernels.passes import passes_of
from weyl_megatron.spectral.blocks import Blocks, MatrixSpec
from weyl_megatron.spectral.tiles import Block, Tile, tiles_of_range

pytest.importorskip("triton")

from weyl_megatron.kernels.units import BLOCK, PIECE, UNIT

CPU = torch.device("cpu")
F32 = torch.float32, torch.float32
MIXED = [F32, (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
#: As the kernels have them at the usual widths: rows that a program multiplies at once.
BANDS = 8, 4
COLS = 64


class Case(NamedTuple):
    """Matrices in pieces, as a rank holds them."""

    matrices: list[MatrixSpec]
    tiles: list[Tile]  # measured
    others: list[Tile]  # replicas, and what is no matrix
    dtypes: list[units.Dtypes]


def laid_out(
    shapes: Sequence[tuple[int, int]], cuts: Sequence[float], fused: bool, gap: int, mixed: bool
) -> Case:
    """Return matrices, each in a buffer of its own if it is not cut; ``fused``: two are interleaved
    by rows.
    """
    matrices: list[MatrixSpec] = []
    tiles: list[Tile] = []
    kinds: list[units.Dtypes] = []  # the pieces of a matrix are of one kind
    buffer = 0
    for number, (rows, cols) in enumerate(shapes):
        first = len(matrices)
        parts = 2 if fused and number % 2 else 1
        matrices += [MatrixSpec(f"w{number}.{part}", rows, cols) for part in range(parts)]
        # Side by side in a row of the grid: tiles with a stride.
        blocks = [Block(first + p, 0, p * cols, rows, cols, 0, 0) for p in range(parts)]
        size = rows * cols * parts
        edges = [0, *sorted(int(cut * size) for cut in cuts), size]
        for start, stop in pairwise(edges):
            tiles += tiles_of_range(blocks, cols * parts, start, stop, gap, buffer)
            buffer += 1
            kinds.append(MIXED[number % 3 if mixed else 0])
    others = [Tile(0, 0, 0, 3, 5, 1, 7, buffer), Tile(-1, 0, 0, 2, 4096, 2, 4096, buffer + 1)]
    return Case(matrices, tiles, others, [*kinds, MIXED[0], MIXED[-1]])


cases = st.builds(
    laid_out,
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90)), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), max_size=2),
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
)


def elements(tile: Tile) -> set[int]:
    return {
        tile.offset + row * tile.stride + col
        for row in range(tile.rows)
        for col in range(tile.cols)
    }


def columns(table: Tensor, names: Sequence[str]) -> list[dict[str, int]]:
    assert table.shape[1] == len(names)
    return [dict(zip(names, row, strict=True)) for row in table.tolist()]


def blocks_of(case: Case, widths: tuple[int, int] = (4, 4)) -> Blocks:
    batches = [range(len(case.matrices))]
    return Blocks(
        case.matrices, case.tiles, widths, batches, False, CPU, torch.float32, resident=True
    )


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small matrices are cut, too."""
    monkeypatch.setattr(passes, "_LEAST_ELEMENTS", 64)


@settings(max_examples=40)
@given(cases, st.sampled_from([1, 7, 528]))
def test_a_pass_goes_once_through_every_element(case: Case, programs: int) -> None:
    everything, measured = [*case.tiles, *case.others], len(case.tiles)
    count = len(case.matrices)
    cut = passes_of(everything, measured, count, case.dtypes, programs, CPU)
    rows = columns(cut.units, UNIT)
    visits: Counter[tuple[int, int]] = Counter()
    for row in rows:
        unit = Tile(row["matrix"], 0, 0, row["rows"], row["cols"], row["offset"], row["stride"])
        visits.update((row["buffer"], element) for element in elements(unit))
    wanted = Counter((tile.buffer, element) for tile in everything for element in elements(tile))
    assert visits == wanted
    # Each launch is of units of its own dtypes, and together they are all.
    assert [unit for launch in cut.launches for unit in range(*launch[1:])] == list(
        range(len(rows))
    )
    for launch in cut.launches:
        assert {case.dtypes[row["buffer"]] for row in rows[launch.start : launch.stop]} == {
            launch.dtypes
        }
    # A matrix's span holds its measured units, and of the rest only what is to be added: its own.
    for matrix, (start, stop) in enumerate(cut.spans.tolist()):
        own = [n for n, row in enumerate(rows) if row["matrix"] == matrix and row["made"]]
        assert own == list(range(start, stop))
    # What lies densely is one run, not rows.
    dense = {tile.buffer for tile in everything if tile.rows == 1 or tile.stride == tile.cols}
    strided = {tile.buffer for tile in everything} - dense
    assert all(row["rows"] == 1 for row in rows if row["buffer"] not in strided | _both(everything))


def _both(tiles: Sequence[Tile]) -> set[int]:
    """Return the buffers that have tiles of both kinds."""
    kinds: dict[int, set[bool]] = {}
    for tile in tiles:
        kinds.setdefault(tile.buffer, set()).add(tile.rows == 1 or tile.stride == tile.cols)
    return {buffer for buffer, both in kinds.items() if len(both) > 1}


@settings(max_examples=40)
@given(cases, st.sampled_from([1, 7, 528]), st.sampled_from([(4, 4), (4, 8), (4, 16)]))
def test_units_and_strips_take_every_row_of_each_operand_once(
    case: Case, programs: int, widths: tuple[int, int]
) -> None:
    blocks = blocks_of(case, widths)
    cut = units.products(blocks, BANDS, widths, case.dtypes, programs, COLS)
    wanted: Counter[tuple[int, int, int]] = Counter()
    for operand in (0, 1):
        for tile in case.tiles:
            for line in range(tile.rows):
                wanted[operand, tile.buffer, tile.offset + line * tile.stride] += 1
    lines_of: list[dict[tuple[int, int, int], int]] = []  # where Y of each whole row lies
    for table in (cut.units, cut.strips):
        visits: Counter[tuple[int, int, int]] = Counter()
        places: dict[tuple[int, int, int], int] = {}
        for row in columns(table, UNIT):
            operand, matrix = blocks.operands[row["operand"]], blocks.matrices[row["matrix"]]
            assert row["n"] == matrix.cols and row["width"] == operand.widths[row["matrix"]]
            assert row["x"] == operand.x_at[row["matrix"]] + row["col"]
            assert (row["left"] >= 0) == (row["cols"] < matrix.cols)
            for line in range(row["rows"]):
                key = row["operand"], row["buffer"], row["offset"] + line * row["stride"]
                visits[key] += 1
                if row["left"] < 0:
                    places[key] = row["line"] + line * widths[row["operand"]]
        assert visits == wanted
        lines_of.append(places)
    # Strips read Y where units leave them; they lie apart, and can be stored four at a time.
    assert lines_of[0] == lines_of[1]
    taken = sorted((place, place + widths[key[0]]) for key, place in lines_of[0].items())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert not taken or taken[-1][1] <= cut.lines
    assert all(start % 4 == 0 for start, _ in taken)
    rows = columns(cut.units, UNIT)
    of_both = [unit for launch in cut.launches for unit in range(*launch[1:])]
    assert of_both == list(range(len(rows)))
    of_update = [unit for launch in cut.of_update for unit in range(*launch[1:])]
    assert of_update == [n for n, row in enumerate(rows) if row["operand"] == 1]
    for launch in (*cut.launches, *cut.of_update):
        assert {case.dtypes[row["buffer"]] for row in rows[launch.start : launch.stop]} == {
            launch.dtypes
        }


@settings(max_examples=40)
@given(cases, st.sampled_from([1, 7]), st.sampled_from([(4, 4), (4, 16)]))
def test_pieces_sum_every_column_of_each_strip_once_and_every_unit_s_gram(
    case: Case, programs: int, widths: tuple[int, int]
) -> None:
    blocks = blocks_of(case, widths)
    cut = units.products(blocks, BANDS, widths, case.dtypes, programs, COLS)
    rows, strips = columns(cut.units, UNIT), columns(cut.strips, UNIT)
    seen: Counter[tuple[int, int, int, int]] = Counter()
    counted: dict[int, list[int]] = {}
    grams: list[tuple[int, int]] = []
    taken: set[tuple[int, int]] = set()
    for piece in columns(cut.pieces, PIECE):
        key = piece["operand"], piece["matrix"]
        operand, matrix = blocks.operands[key[0]], blocks.matrices[key[1]]
        assert piece["z"] == operand.z_at[key[1]]
        if piece["start"] < 0:
            grams.append(key)
            own = [n for n, row in enumerate(rows) if (row["operand"], row["matrix"]) == key]
            assert own == list(range(piece["first"], piece["last"]))
            split = range(piece["cut"], piece["last"])
            assert [n for n in own if rows[n]["left"] >= 0] == list(split)
            continue
        own = [n for n, strip in enumerate(strips) if (strip["operand"], strip["matrix"]) == key]
        assert piece["strips"] == len(own)
        if own:
            assert own[piece["number"]] == piece["strip"]
        stop = min(piece["start"] + COLS, matrix.cols)
        seen.update((*key, piece["strip"], col) for col in range(piece["start"], stop))
        counted.setdefault(piece["counter"], []).append(piece["number"])
        if piece["strips"] > 1:
            size = piece["strips"] * operand.widths[key[1]] * matrix.cols
            taken.add((piece["sums"], piece["sums"] + size))
    pieces = columns(cut.pieces, PIECE)
    moved = [number for launch in cut.moves for number in range(*launch[1:])]
    assert moved == [n for n, p in enumerate(pieces) if p["operand"] == 1 and p["start"] >= 0]
    for k, (start, stop) in enumerate(cut.spans.tolist()):
        assert list(range(start, stop)) == [n for n in moved if pieces[n]["matrix"] == k]
    assert set(seen.values()) <= {1}
    own_strips = Counter((strip["operand"], strip["matrix"]) for strip in strips)
    assert len(seen) == sum(
        matrix.cols * max(1, own_strips[number, k])
        for number in (0, 1)
        for k, matrix in enumerate(blocks.matrices)
    )
    assert sorted(grams) == [(number, k) for number in (0, 1) for k in range(len(blocks.matrices))]
    # Whoever comes last of a counter's strips has all of them.
    assert sorted(counted) == list(range(cut.counters))
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in counted.values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(sorted(taken)))
    assert max((stop for _, stop in taken), default=0) <= cut.sums
    kinds = columns(cut.blocks, BLOCK)
    assert len({(row["operand"], row["matrix"]) for row in kinds}) == 2 * len(blocks.matrices)


@settings(max_examples=40)
@given(cases, st.sampled_from([1, 7, 528]), st.sampled_from([(4, 4), (4, 16)]))
def test_copies_have_units_and_moves_and_are_summed_nowhere(
    case: Case, programs: int, widths: tuple[int, int]
) -> None:
    blocks = blocks_of(case, widths)  # which know the rows that ranks cut
    copies = [tile for tile in case.tiles if tile.buffer % 2]
    measured = [tile for tile in case.tiles if tile.buffer % 2 == 0]
    for operand in blocks.operands:
        operand.tabulate(blocks.batches, measured, CPU)
    cut = units.products(blocks, BANDS, widths, case.dtypes, programs, COLS, copies)
    tables = []
    for table in (cut.units, cut.strips):
        rows = columns(table, UNIT)
        tables.append(rows)
        own = [row for row in rows if row["buffer"] % 2]
        assert rows[-len(own) :] == own or not own, "they stand behind what is measured"
        visits = Counter(
            (row["buffer"], row["offset"] + line * row["stride"])
            for row in own
            for line in range(row["rows"])
        )
        assert visits == Counter(
            (tile.buffer, tile.offset + line * tile.stride)
            for tile in copies
            for line in range(tile.rows)
        )
        assert {row["operand"] for row in own} <= {1}
    of_units, strips = tables
    assert all(row["left"] < 0 for row in of_units if row["buffer"] % 2)
    for row in strips:
        assert (row["left"] >= 0) == (row["cols"] < blocks.matrices[row["matrix"]].cols)
    launched = [unit for launch in cut.of_update for unit in range(*launch[1:])]
    assert launched == [n for n, row in enumerate(of_units) if row["operand"] == 1]
    pieces = columns(cut.pieces, PIECE)
    collected = {number for launch in cut.collections for number in range(*launch[1:])}
    of_copies = [n for n in range(len(pieces)) if n not in collected]
    assert all(strips[pieces[n]["strip"]]["buffer"] % 2 for n in of_copies)
    moved = [number for launch in cut.moves for number in range(*launch[1:])]
    assert set(of_copies) <= set(moved) and len(moved) == len(set(moved))
    seen = Counter((pieces[n]["strip"], pieces[n]["start"]) for n in of_copies)
    assert seen == Counter(
        (n, col)
        for n, strip in enumerate(strips)
        if strip["buffer"] % 2
        for col in range(0, blocks.matrices[strip["matrix"]].cols, COLS)
    )
    for start, stop in cut.spans.tolist():
        assert not set(range(start, stop)) & set(of_copies)
    # The passes find their M and V made, and sum nothing of them either.
    count = len(case.matrices)
    everything = [*measured, *copies], len(measured), count, case.dtypes, programs, CPU
    of_passes = passes_of(*everything, set(range(count)))
    rows = columns(of_passes.units, UNIT)
    assert all(row["made"] for row in rows)
    summed = {n for start, stop in of_passes.spans.tolist() for n in range(start, stop)}
    assert all((n in summed) == (row["buffer"] % 2 == 0) for n, row in enumerate(rows))


@pytest.mark.parametrize("programs", [108 * 4, 132 * 4])
def test_units_hang_on_the_device_not_on_the_depth(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of matrices in the proportions of GPT-2's, of which a program has a share."""
    monkeypatch.undo()
    counts = []
    for depth in (12, 48):
        shapes = [(768, 768), (2304, 768), (3072, 768), (768, 3072)] * depth
        matrices = [MatrixSpec(f"w{n}", *shape) for n, shape in enumerate(shapes)]
        tiles = [Tile(n, 0, 0, *shape, 0, shape[1], n) for n, shape in enumerate(shapes)]
        case = Case(matrices, tiles, [], [F32] * len(tiles))
        of_passes = passes_of(tiles, len(tiles), len(tiles), case.dtypes, programs, CPU)
        products = units.products(blocks_of(case), BANDS, (4, 4), case.dtypes, programs, COLS)
        counts.append((len(of_passes.units), len(products.units)))
        # One unit a matrix more than their shares, which end with the matrix.
        assert counts[-1][0] <= 4 * programs + len(tiles)
        # Rounded up to a band, a share of U is less than a program's, by a third of it in W.
        assert counts[-1][1] <= 2 * programs + 2 * len(tiles)
        own = Counter((row["operand"], row["matrix"]) for row in columns(products.units, UNIT))
        assert max(own.values()) <= 128
    print(f"\n{programs} programs: {counts} units")
