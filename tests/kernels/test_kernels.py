"""The compiled kernel against plain torch on the same tables: odd shapes, cut rows, strides,
replicas, no gradients.

Triton's, which steers itself, is tested by whole steps: test_triton.py, test_runs.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weyl_megatron.environment import CXXFLAGS
from weyl_megatron.kernels import Hyper, Kernel, Stepped
from weyl_megatron.kernels.cpu import CpuKernel
from weyl_megatron.kernels.plain import PlainKernel
from weyl_megatron.spectral.blocks import COLUMNS, Blocks, MatrixSpec, Table, table
from weyl_megatron.spectral.tiles import Block, Tile, tiles_of_range

EXAMPLES = 60
#: Of sums of a few thousand products in another order. The sanitizers compile with -O1, by which up
#: to 4096 squares are summed in one chain: twice √4096 · 2⁻²⁴.
ROUNDING = 8e-6 if "-fsanitize" in os.environ.get(CXXFLAGS, "") else 2e-6


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Case:
    """Matrices in flat buffers, cut into pieces; two copies of everything, one per kernel."""

    def __init__(
        self, shapes: list[tuple[int, int]], cuts: list[float], gap: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.specs = [MatrixSpec(f"w{number}", *shape) for number, shape in enumerate(shapes)]
        tiles: list[Tile] = []
        sizes = []
        for k, (rows, cols) in enumerate(shapes):
            edges = [0, *sorted(int(cut * rows * cols) for cut in cuts), rows * cols]
            at = gap
            for start, stop in pairwise(edges):
                tiles += tiles_of_range(
                    [Block(k, 0, 0, rows, cols, 0, 0)], cols, start, stop, at, buffer=k
                )
                at += stop - start + gap
            sizes.append(at)
        rest = Tile(-1, 0, 0, 3, 5, 1, 6, buffer=len(sizes))  # of no matrix, with a stride
        without = Tile(0, 0, 0, 2, 2, 0, 2, buffer=len(sizes) + 1)  # a replica, measured elsewhere
        sizes += [20, 6, 4]  # and a buffer without gradient
        self.specs.append(MatrixSpec("still", 2, 2))
        tiles.append(Tile(len(shapes), 0, 0, 2, 2, 0, 2, buffer=len(sizes) - 1))
        self.tiles, self.others = tiles, [without, rest]
        self.hypers = [
            Hyper(0.01 * (n + 1), 0.9, 0.95, 1e-8, 0.1 * (n % 2), 3.0 + n)
            for n in range(len(sizes))
        ]
        self.weights = [torch.randn(size, generator=generator) for size in sizes]
        self.grads = [torch.randn(size, generator=generator) for size in sizes]
        self.first = [torch.randn(size, generator=generator) * 0.1 for size in sizes]
        self.second = [torch.rand(size, generator=generator) for size in sizes]
        self.mask = torch.ones(len(self.specs), dtype=torch.uint8)
        self.none = torch.zeros_like(self.mask)
        self.rates = torch.rand(len(self.specs), dtype=torch.float64, generator=generator) * 0.01

    def copy(self, kernel: str) -> Copy:
        return Copy(copy.deepcopy(self), kernel)


class Copy:
    def __init__(self, case: Case, kernel: str, widths: tuple[int, int] = (4, 4)) -> None:
        self.case = case
        batches = [range(len(case.specs))]
        self.blocks = Blocks(
            case.specs, case.tiles, widths, batches, False, torch.device("cpu"), torch.float32
        )
        self.kernel: Kernel = (CpuKernel if kernel == "fused" else PlainKernel)(self.blocks)
        self.sums = torch.zeros(len(case.specs), 3, dtype=torch.float64)
        self.sigma, self.gain = torch.zeros(2, len(case.specs), dtype=torch.float64)
        triples = zip(case.grads, case.first, case.second, case.hypers, strict=True)
        stepped: list[Stepped | None] = [Stepped(*each) for each in triples]
        stepped[-1] = None
        self.kernel.bind(case.weights, stepped)
        self.blocks.load(0)

    @property
    def table(self) -> Table:
        operand = self.blocks.operands[1]
        tiles = sorted(self.case.tiles, key=lambda tile: tile.matrix)
        rows = [operand.row(tile) for tile in tiles]
        rows += [
            [*(t.buffer, t.offset, t.rows, t.cols, t.stride, t.matrix), *[0] * 7]
            for t in self.case.others
        ]
        assert all(len(row) == len(COLUMNS) for row in rows)
        return table(rows, torch.device("cpu"), tiles + self.case.others)

    def state(self) -> list[Tensor]:
        return [*self.case.weights, *self.case.first, *self.case.second]


cases = st.builds(
    Case,
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=3),
    st.lists(st.floats(0, 1), max_size=3),
    st.integers(0, 3),
    st.integers(0, 99),
)


def near(tensor: Tensor, expected: Tensor, rounding: float = ROUNDING) -> bool:
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return torch.allclose(tensor, expected, rtol=0, atol=rounding * max(scale, 1e-30))


@settings(max_examples=EXAMPLES)
@given(cases)
def test_one_pass_moves_and_sums_as_plain_torch(case: Case) -> None:
    fused, plain = case.copy("fused"), case.copy("plain")
    for each in (fused, plain):
        each.kernel.step(each.table, case.mask, each.sums)
    assert all(map(near, fused.state(), plain.state()))
    assert near(fused.sums, plain.sums)
    before = [weight.clone() for weight in case.weights]
    fused.kernel.undo(fused.table, case.mask)
    rest = len(before) - 3
    for number, (undone, weight) in enumerate(zip(fused.case.weights, before, strict=True)):
        assert number == rest or near(undone, weight), "what was undone is not what it was"
    for each in (fused, plain):
        each.sums.zero_()
        each.kernel.undo(each.table, case.none)
    plain.kernel.undo(plain.table, case.mask)
    for each in (fused, plain):
        each.kernel.move(each.table, case.mask, case.rates, each.sums)
    assert all(map(near, fused.state(), plain.state()))
    assert near(fused.sums, plain.sums)


@settings(max_examples=EXAMPLES)
@given(cases)
def test_products_and_blocks_are_those_of_plain_torch(case: Case) -> None:
    fused, plain = case.copy("fused"), case.copy("plain")
    for each in (fused, plain):
        kernel, (of_weights, of_updates) = each.kernel, each.blocks.operands
        everything = each.table
        tiles = [tile for tile in everything.tiles if tile.matrix >= 0]  # as in a batch's table
        of_batch = Table(tiles, everything.columns[: len(tiles)].contiguous())
        kernel.moments(of_batch, case.mask, each.sums)
        kernel.multiply_back(1, of_updates.cut[0], case.mask)
        for part in (of_weights.cut[0], of_weights.whole[0]):
            kernel.multiply(0, part, case.mask)
        kernel.multiply_back(0, of_weights.cut[0], case.mask)
    assert all(map(near, fused.state(), plain.state()))
    assert near(fused.sums, plain.sums) and near(fused.blocks.left, plain.blocks.left)
    assert near(fused.blocks.z, plain.blocks.z)
    for operand in (0, 1):
        for each in (fused, plain):
            each.kernel.orthonormalize(operand, 0, case.mask, case.none, each.sigma, each.gain)
        # Y that are almost parallel are told apart in other ways.
        assert near(fused.sigma, plain.sigma, 1e-4)
        assert torch.equal(fused.gain.isinf(), plain.gain.isinf())
        assert torch.allclose(fused.gain, plain.gain, rtol=0, atol=1e-4), "a gain is a share of σ₁"
        for k in range(len(case.specs)):
            rows, cols = case.specs[k].rows, case.specs[k].cols
            block = fused.blocks.operands[operand].block(k)
            expected = plain.blocks.operands[operand].block(k)
            assert near(block @ block.T, torch.eye(len(block)), 1e-3), "not orthonormal"
            if (rows, cols) != (2, 2) and len(block) == min(rows, 4):
                overlap = torch.linalg.svdvals(block @ expected.T)
                assert float(overlap.max()) > 0.99


@settings(max_examples=EXAMPLES)
@given(cases, st.integers(0, 3))
def test_what_is_masked_is_left_alone(case: Case, number: int) -> None:
    number = min(number, len(case.specs) - 2)
    mask = case.mask.clone()
    mask[number] = 0
    fused = case.copy("fused")
    before = [tensor.clone() for tensor in fused.state()]
    fused.kernel.step(fused.table, mask, fused.sums)
    fused.kernel.multiply(0, fused.blocks.operands[0].whole[0], mask)
    fused.kernel.orthonormalize(0, 0, mask, case.none, fused.sigma, fused.gain)
    buffers = len(case.weights)
    of_masked = fused.state()[number::buffers], before[number::buffers]
    assert all(map(torch.equal, *of_masked))
    assert not fused.sums[number].any() and not fused.blocks.operands[0].image(number)[0].any()
    assert fused.sigma[number] == 0


@pytest.mark.parametrize(
    ("scale", "rank"), [(1.0, 1), (1.0, 40), (1e-30, 40), (1e30, 40), (0.0, 1)], ids=str
)
def test_matrices_of_any_size_and_rank(scale: float, rank: int) -> None:
    case = Case([(40, 50)], [], 0, 0)
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(40, rank, generator=generator), torch.randn(rank, 50, generator=generator)
    case.weights[0][:] = (factors[0] @ factors[1]).flatten() * scale
    fused = case.copy("fused")
    for iteration in range(12):
        fused.blocks.clear(0)
        fused.kernel.multiply(0, fused.blocks.operands[0].whole[0], case.mask)
        more = case.mask if iteration < 11 else case.none
        fused.kernel.orthonormalize(0, 0, case.mask, more, fused.sigma, fused.gain)
    exact = float(torch.linalg.matrix_norm(case.weights[0].view(40, 50).double(), 2))
    assert float(fused.sigma[0]) == pytest.approx(exact, rel=2e-3)
    assert float(fused.sigma[0]) <= exact * (1 + 1e-5)
    assert fused.blocks.operands[0].block(0).isfinite().all()


def test_a_value_that_is_not_finite_is_not_a_number_and_harms_no_other() -> None:
    case = Case([(20, 30), (20, 30)], [], 0, 0)
    case.weights[0][7] = float("inf")
    fused = case.copy("fused")
    fused.kernel.multiply(0, fused.blocks.operands[0].whole[0], case.mask)
    fused.kernel.orthonormalize(0, 0, case.mask, case.none, fused.sigma, fused.gain)
    assert fused.sigma[:2].isnan().tolist() == [True, False]
    assert fused.blocks.operands[0].block(0).isfinite().all(), "the next step could not recover"


@pytest.mark.parametrize(
    ("m", "v"),
    [(0.0, 0.0), (0.1, float("inf")), (1e-20, 0.0), (0.1, float("nan")), (float("nan"), 1.0)],
    ids=str,
)
def test_an_update_of_moments_that_are_zero_infinite_or_no_number_is_plain_torch_s(
    m: float, v: float
) -> None:
    case = Case([(20, 37)], [], 0, 0)
    # In vector registers and at the ends of rows.
    case.first[0][5:200] = m
    case.second[0][5:200] = v
    fused, plain = case.copy("fused"), case.copy("plain")
    for each in (fused, plain):
        each.kernel.multiply(1, each.blocks.operands[1].whole[0], case.mask)
    assert torch.equal(fused.blocks.z.isnan(), plain.blocks.z.isnan())
    assert near(fused.blocks.z.nan_to_num(), plain.blocks.z.nan_to_num())
    assert bool(plain.blocks.z.isnan().any()) == (m != m or v != v)
