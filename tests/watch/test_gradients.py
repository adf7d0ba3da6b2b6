"""Sums over a piece of a matrix, wherever an engine cuts it. test_layouts.py has real engines."""

from __future__ import annotations

import itertools

import pytest
import torch

from weyl_megatron.layouts.buffers import Parameter, Shard, Spread
from weyl_megatron.watch.gradients import _Piece

SHAPE = (5, 4)
ELEMENTS = 20


def piece(start: int, stop: int, *, is_transposed: bool, is_repeated: bool = False) -> _Piece:
    shard = Shard(Parameter("w", SHAPE), start, stop, 3)
    return _Piece(torch.empty(0), shard, SHAPE, (0, 0), is_transposed, is_repeated, ())


@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_range_of_a_flat_matrix_is_summed_by_output(is_transposed: bool) -> None:
    whole = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    ranges = [r for r in itertools.product(range(ELEMENTS + 1), repeat=2) if r[0] <= r[1]]
    assert len(ranges) == 231
    for start, stop in ranges:
        # Three elements of another parameter before it, two behind it.
        flat = torch.full((stop - start + 5,), 1e6)
        flat[3 : 3 + stop - start] = whole[start:stop]
        sums = piece(start, stop, is_transposed=is_transposed).sums(flat)
        inside = torch.zeros(ELEMENTS, dtype=torch.bool)
        inside[start:stop] = True
        squares = torch.where(inside, whole, 0.0).double().square().view(SHAPE)
        along = 0 if is_transposed else 1
        # A float32 norm of at most 5 elements is squared.
        torch.testing.assert_close(sums[0], squares.sum(along), rtol=1e-6, atol=0)
        assert sums[1].tolist() == inside.view(SHAPE).sum(along).tolist(), (start, stop)


def test_half_precision_is_summed_in_float32() -> None:
    flat = torch.full((3 + ELEMENTS,), 300.0, dtype=torch.float16)  # its square overflows
    sums = piece(0, ELEMENTS, is_transposed=False).sums(flat)
    assert sums[0].tolist() == pytest.approx([4 * 300.0**2] * 5, rel=1e-6)


def test_a_copy_counts_nothing() -> None:
    assert Spread(None, 1, True).is_repeated  # type: ignore[arg-type]
    copied = piece(0, ELEMENTS, is_transposed=False, is_repeated=True)
    assert copied.sums(torch.ones(3 + ELEMENTS)).count_nonzero() == 0
