from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from weyl_megatron.spectral.tiles import Block, Tile, range_rectangles, tiles_of_range


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
def test_a_range_is_at_most_three_rectangles_that_cover_it_once(
    one: int, other: int, width: int
) -> None:
    start, stop = sorted((one, other))
    covered = [
        (row + r) * width + col + c
        for row, col, rows, cols in range_rectangles(start, stop, width)
        for r in range(rows)
        for c in range(cols)
    ]
    assert covered == list(range(start, stop))
    assert len(list(range_rectangles(start, stop, width))) <= 3


@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    parts=st.integers(1, 3),
    axis=st.integers(0, 1),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    gap=st.integers(0, 3),
)
def test_tiles_of_all_ranks_rebuild_every_matrix(
    rows: int, cols: int, parts: int, axis: int, cuts: list[float], gap: int
) -> None:
    """Fused matrices side by side, flattened, cut anywhere, each range packed behind a gap in a
    rank's buffer.
    """
    shape = (rows * parts, cols) if axis == 0 else (rows, cols * parts)
    weight = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    blocks = [
        Block(
            part, part * rows if axis == 0 else 0, part * cols if axis == 1 else 0, rows, cols, 0, 0
        )
        for part in range(parts)
    ]
    rebuilt = torch.zeros(parts, rows, cols)
    edges = [0, *sorted(int(cut * weight.numel()) for cut in cuts), weight.numel()]
    for start, stop in pairwise(edges):
        buffer = torch.cat([torch.full((gap,), -1.0), weight.flatten()[start:stop]])
        for tile in tiles_of_range(blocks, shape[1], start, stop, gap):
            piece = buffer.as_strided((tile.rows, tile.cols), (tile.stride, 1), tile.offset)
            rebuilt[
                tile.matrix, tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols
            ] += piece
    assert torch.equal(rebuilt, torch.stack(weight.chunk(parts, axis)))


def test_a_cell_in_no_block_yields_no_tile() -> None:
    corner = [Block(0, 0, 0, 1, 1, 0, 0)]
    assert list(tiles_of_range(corner, 2, 0, 4, 0)) == [Tile(0, 0, 0, 1, 1, 0, 2)]
