from __future__ import annotations

from itertools import pairwise, product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weyl_megatron.layouts.buffers import Parameter
from weyl_megatron.layouts.fused import (
    Fused,
    explicit_fused,
    interleaved,
    known_fused,
    plain_name,
    stacked,
    stacked_in_bands,
)
from weyl_megatron.layouts.grid import Box, Grid, grid_of
from weyl_megatron.layouts.kinds import Kind


def rebuild(grid: Grid, weight: torch.Tensor) -> list[torch.Tensor]:
    cells = weight.reshape(-1, grid.width)
    matrices = [torch.zeros(shape.rows, shape.cols) for shape in grid.matrices]
    for b in grid.blocks:
        matrices[b.matrix][b.row : b.row + b.rows, b.col : b.col + b.cols] += cells[
            b.grid_row : b.grid_row + b.rows, b.grid_col : b.grid_col + b.cols
        ]
    return matrices


def test_a_matrix_is_itself() -> None:
    weight = torch.randn(5, 3)
    assert torch.equal(rebuild(grid_of((5, 3)), weight)[0], weight)


def test_a_convolution_is_out_by_in_times_kernel() -> None:
    weight = torch.randn(4, 3, 2, 2)
    assert torch.equal(rebuild(grid_of(weight.shape), weight)[0], weight.reshape(4, 12))


def test_stacked_experts_are_one_matrix_each() -> None:
    weight = torch.randn(3, 4, 5)
    matrices = rebuild(grid_of(weight.shape), weight)
    assert len(matrices) == 3 and all(
        torch.equal(m, w) for m, w in zip(matrices, weight, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [("h.0.attn.c_attn.weight", (12, 4), 0), ("c_attn.weight", (4, 12), 1)],
)
def test_gpt2_s_stacked_qkv_is_three_matrices(name: str, shape: tuple[int, int], axis: int) -> None:
    weight = torch.randn(shape)
    fused = known_fused(name, shape)
    assert fused is not None
    grid = grid_of(shape, fused=fused)
    assert [matrix.suffix for matrix in grid.matrices] == ["[q]", "[k]", "[v]"]
    for matrix, part in zip(rebuild(grid, weight), weight.chunk(3, axis), strict=True):
        assert torch.equal(matrix, part)


def test_a_grouped_query_weight_of_that_name_is_left_whole() -> None:
    assert known_fused("h.0.attn.qkv.weight", (8, 4)) is None


def boxes_along(shape: tuple[int, ...], dim: int, sizes: tuple[int, ...]) -> list[Box]:
    boxes = []
    for rank, size in enumerate(sizes):
        starts, extents = [0] * len(shape), list(shape)
        starts[dim], extents[dim] = sum(sizes[:rank]), size
        boxes.append(Box(tuple(starts), tuple(extents)))
    return boxes


def held(weight: torch.Tensor, box: Box) -> torch.Tensor:
    return weight[tuple(slice(s, s + e) for s, e in zip(*box, strict=True))]


@pytest.mark.parametrize("fused", [None, stacked(0, (2, 4), ("0", "1"))])
@pytest.mark.parametrize("dim", [0, 1])
def test_bands_of_uneven_size_make_up_the_matrices(dim: int, fused: Fused | None) -> None:
    weight = torch.randn(6, 5)
    total: list[Any] = [0.0, 0.0]
    for box in boxes_along((6, 5), dim, (5, 0, 1) if dim == 0 else (2, 3)):
        grid = grid_of((6, 5), box=box, fused=fused)
        for number, matrix in enumerate(rebuild(grid, held(weight, box).contiguous())):
            total[number] = total[number] + matrix
    expected = [weight] if fused is None else weight.split(fused.sizes, 0)
    assert all(torch.equal(t, e) for t, e in zip(total, expected, strict=False))


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_boxes_of_a_weight_make_up_the_matrices_of_the_whole(
    shape: list[int], data: st.DataObject
) -> None:
    """Cut along any dimensions, anywhere, lying in memory in any order; some boxes are empty."""
    form = data.draw(st.sampled_from(["experts", "convolution", None]))
    groups = data.draw(st.sampled_from([g for g in range(1, shape[0] + 1) if shape[0] % g == 0]))
    kind = None if form is None else Kind(form, groups=groups if form == "convolution" else 1)
    order = data.draw(st.permutations(range(len(shape))))
    weight = torch.arange(1.0, prod(shape) + 1).view(shape)
    axis = data.draw(st.sampled_from([None, 0, 1])) if len(shape) == 2 else None
    fused = None
    if axis is not None:
        size = data.draw(st.integers(0, shape[axis]))
        fused = stacked(axis, (size, shape[axis] - size), ("0", "1"))
    edges = [[0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=2))), n] for n in shape]
    known: dict[str, Any] = {"fused": fused, "kind": kind, "order": order}
    expected = rebuild(grid_of(shape, **known), weight.permute(order).contiguous())
    total = [torch.zeros_like(matrix) for matrix in expected]
    for ranges in product(*(list(pairwise(each)) for each in edges)):
        starts, stops = zip(*ranges, strict=True)
        extents = tuple(stop - start for start, stop in ranges)
        box = Box(starts, extents)
        assert all(stop >= start for start, stop in zip(starts, stops, strict=True))
        grid = grid_of(shape, box=box, **known)
        assert [m[1:] for m in grid.matrices] == [tuple(matrix.shape) for matrix in expected]
        if prod(extents):
            local = held(weight, box).permute(order).contiguous()
            for whole, part in zip(total, rebuild(grid, local), strict=True):
                whole += part
    assert all(map(torch.equal, total, expected))


def test_the_box_of_a_grouped_convolution_may_begin_within_a_group() -> None:
    weight, kind = torch.randn(12, 2, 3), Kind("convolution", groups=3)
    total = [torch.zeros(4, 6)] * 3
    for box in boxes_along((12, 2, 3), 0, (5, 4, 3)):
        grid = grid_of((12, 2, 3), box=box, kind=kind)
        local = held(weight, box)
        total = [a + b for a, b in zip(total, rebuild(grid, local), strict=True)]
    assert all(map(torch.equal, total, weight.flatten(1).chunk(3)))


def test_told_parts_that_do_not_divide_name_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"^AdamW2: .*'fused' of parameter 'w' got 4, but it"):
        explicit_fused("w", (5, 3), 4)
    assert explicit_fused("w", (5, 3), [2, 3]) == stacked(0, (2, 3), ("0", "1"))


@pytest.mark.parametrize(
    ("shape", "is_vector"),
    [((3,), True), ((), True), ((1, 1, 9), True), ((1, 4, 9), False), ((1, 9), False)],
)
def test_gains_biases_and_class_tokens_are_vectors(shape: tuple[int, ...], is_vector: bool) -> None:
    assert Parameter("p", shape).is_vector is is_vector


def test_every_rank_of_tensor_parallelism_stacks_its_shares_of_the_parts() -> None:
    parts = torch.randn(4, 5), torch.randn(2, 5)
    weight = torch.cat([parts[0][:2], parts[1][:1], parts[0][2:], parts[1][2 - 1 :]])
    fused = stacked_in_bands(stacked(0, (4, 2), ("0", "1")), (3, 3))
    assert fused is not None
    total = [torch.zeros(4, 5), torch.zeros(2, 5)]
    for box in boxes_along((6, 5), 0, (3, 3)):
        found = rebuild(grid_of((6, 5), box=box, fused=fused), held(weight, box))
        total = [a + b for a, b in zip(total, found, strict=True)]
    assert all(map(torch.equal, total, parts))


def test_parts_that_ranks_cannot_share_out_evenly_are_not_told_apart() -> None:
    assert stacked_in_bands(stacked(0, (3, 3), ("0", "1")), (3, 3)) is None
    assert stacked_in_bands(stacked(0, (4, 2), ("0", "1")), (4, 2)) is None


@given(
    pattern=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    repeats=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_bands_of_an_interleaved_weight_make_up_its_matrices(
    pattern: list[int], repeats: int, cuts: list[int]
) -> None:
    """Megatron's linear_qkv, cut anywhere: also where a query group spans ranks."""
    rows, labels = sum(pattern) * repeats, [str(part) for part in range(len(pattern))]
    weight = torch.arange(1, rows * 3 + 1.0).view(rows, 3)
    edges = [0, *sorted({min(cut, rows) for cut in cuts} - {0, rows}), rows]
    found = [torch.zeros(size * repeats, 3) for size in pattern]
    fused = interleaved(pattern, labels, rows)
    for start, stop in pairwise(edges):
        grid = grid_of((rows, 3), box=Box((start, 0), (stop - start, 3)), fused=fused)
        for whole, mine in zip(found, rebuild(grid, weight[start:stop]), strict=True):
            whole += mine
    for part, matrix in enumerate(found):
        start = sum(pattern[:part])
        expected = weight.view(repeats, sum(pattern), 3)[:, start : start + pattern[part]].reshape(
            -1, 3
        )
        assert torch.equal(matrix, expected)


def test_a_parametrized_weight_is_fused_as_the_plain_one_is() -> None:
    plain = known_fused("h.0.attn.c_attn.weight", (12, 4))
    assert plain is not None and plain == known_fused(
        "h.0.attn.c_attn.parametrizations.weight.original", (12, 4)
    )


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("attn.parametrizations.in_proj_weight.original", "attn.in_proj_weight"),
        ("h.0.c_attn.parametrizations.weight.original1", "h.0.c_attn.weight"),
        ("parametrizations.weight.original", "weight"),
        ("h.0.c_attn.weight_v", "h.0.c_attn.weight"),
        ("h.0.c_attn.weight_orig", "h.0.c_attn.weight"),
        ("base.h.0.c_attn.base_layer.weight", "base.h.0.c_attn.weight"),
        ("base.c_attn.modules_to_save.default.weight", "base.c_attn.weight"),
        ("h.0.c_attn.weight", "h.0.c_attn.weight"),
    ],
)
def test_what_computes_a_weight_does_not_change_its_name(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@given(shape=st.lists(st.integers(1, 4), min_size=3, max_size=5), data=st.data())
def test_every_element_of_a_weight_is_in_one_place_of_one_matrix(
    shape: list[int], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    form = data.draw(st.sampled_from(["experts", "convolution", "matrix", None]))
    groups = data.draw(st.sampled_from([g for g in range(1, shape[0] + 1) if shape[0] % g == 0]))
    kind = None if form is None else Kind(form, groups=groups if form == "convolution" else 1)
    grid = grid_of(shape, kind=kind, order=order)
    places = {
        (block.grid_row + row, block.grid_col + col): (
            block.matrix,
            block.row + row,
            block.col + col,
        )
        for block in grid.blocks
        for row in range(block.rows)
        for col in range(block.cols)
    }
    assert len(places) == len(set(places.values())) == prod(shape)
    assert all(
        0 <= row * grid.width + col < prod(shape) and col < grid.width for row, col in places
    )
    assert sum(matrix.rows * matrix.cols for matrix in grid.matrices) == prod(shape)
    assert all(
        row < grid.matrices[m].rows and col < grid.matrices[m].cols
        for m, row, col in places.values()
    )
