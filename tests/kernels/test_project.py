"""Updates whose singular values are clipped, in plain torch and in compiled code: against singular
value decomposition, and cut between ranks against one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import tolerances
from tests.faults.threads import Group
from tests.kernels.cases import Case as Layout
from tests.kernels.cases import Rank, State, check_alike, on_every_rank
from tests.kernels.test_kernels import Case, Copy, cases, near
from tests.processes import run_ranks
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.batches import tables_of_seen
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.layouts.buffers import Parameter, Plan
from weyl_megatron.spectral.seen import Seen

LR, TAU, DECAY, BETAS = 0.05, 0.01, 0.1, (0.9, 0.95)

#: Rows and columns of odd lengths, a matrix with one singular value, a square one.
SHAPES = [(13, 27), (40, 9), (1, 7), (6, 1), (20, 20), (5, 64), (70, 33)]

#: Options of runs in which every matrix is projected.
PROJECT: dict[str, Any] = {"clip": "project", "io": []}


class Projecting(Copy):
    """A kernel whose vectors of U are wide, and what they saw in one iteration."""

    def __init__(self, case: Case, kernel: str, width: int) -> None:
        super().__init__(case, kernel, (4, width))
        count = len(case.specs)
        self.seen = Seen(self.blocks, 1, range(count))
        parameters = tuple(Parameter(spec.name, spec[1:3]) for spec in case.specs)
        plan = Plan(tuple(case.specs), parameters, (), tuple(case.tiles), (), ())
        (self.of_seen,) = tables_of_seen(plan, self.blocks.batches, self.seen, torch.device("cpu"))

    def iterate(self) -> None:
        updates = self.blocks.operands[1]
        for part in (updates.cut[0], updates.whole[0]):
            self.kernel.multiply(1, part, self.case.mask)
        self.kernel.multiply_back(1, updates.cut[0], self.case.mask)
        self.seen.keep(0, self.case.mask)


@settings(max_examples=60)
@given(cases, st.sampled_from([1, 2, 5, 8, 11, 16, 64]))
def test_wide_products_and_moves_are_those_of_plain_torch(case: Case, width: int) -> None:
    copies = [Projecting(copied, kernel, width) for copied, kernel in two_of(case)]
    fused, plain = copies
    for each in copies:
        each.iterate()
    assert near(fused.seen.z, plain.seen.z) and near(fused.seen.left, plain.seen.left)
    assert torch.equal(fused.seen.x, plain.seen.x)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(plain.seen.z.shape, generator=generator) * 1e-3
    for each in copies:
        each.seen.z.copy_(noise)  # C may be anything
        rates = case.rates, case.rates * 0.5
        each.kernel.project(each.of_seen, case.mask, rates, each.sums, each.seen)
    assert all(map(near, fused.state(), plain.state())) and near(fused.sums, plain.sums)
    before = [tensor.clone() for tensor in fused.state()]
    fused.kernel.project(fused.of_seen, case.none, rates, fused.sums, fused.seen)
    assert all(map(torch.equal, fused.state(), before)), "what is masked is left alone"


@pytest.mark.parametrize("width", [5, 8, 16, 33, 64])
@pytest.mark.parametrize("rank", [1, 3, 64], ids=lambda rank: f"rank {rank}")
def test_wide_blocks_are_made_as_in_plain_torch(width: int, rank: int) -> None:
    """σ₁ and the next vectors, also of matrices that have fewer directions than vectors."""
    case = Case([(64, 70), (90, 64)], [], 0, 0)
    generator = torch.Generator().manual_seed(1)
    for number, (rows, cols) in enumerate([(64, 70), (90, 64)]):
        left, right = (torch.randn(n, rank, generator=generator) for n in (rows, cols))
        case.first[number].view(rows, cols).copy_(left @ right.T)
        case.second[number].fill_(1.0)
    for each in (copies := [Projecting(copied, kernel, width) for copied, kernel in two_of(case)]):
        for _ in range(4):
            each.blocks.clear(0)
            each.iterate()
            each.kernel.orthonormalize(1, 0, case.mask, case.mask, each.sigma, each.gain)
    fused, plain = copies
    # Of 64 directions four iterations see some, of which roundings move with the next block.
    rounding = 1e-4 if rank == 64 else 1e-5
    assert torch.allclose(fused.sigma[:2], plain.sigma[:2], rtol=rounding)
    assert torch.allclose(fused.gain[:2], plain.gain[:2], rtol=0, atol=rounding)
    for k in (0, 1):
        block, expected = (each.blocks.operands[1].block(k) for each in copies)
        assert near(block @ block.T, torch.eye(len(block)), 1e-3)
        if rank == 64 and width <= 16:
            assert float(torch.linalg.svdvals(block @ expected.T).min()) > 0.99
        else:
            assert float(torch.linalg.svdvals(block @ expected.T).max()) > 0.999


def two_of(case: Case) -> list[tuple[Case, str]]:
    return [(case.copy(kernel).case, kernel) for kernel in ("fused", "plain")]


class Run:
    """Matrices with gradients drawn anew in every step, and what a step made of them."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.params = [torch.nn.Parameter(self._draw(shape) * 0.05) for shape in SHAPES]
        named = [(f"w{number}", param) for number, param in enumerate(self.params)]
        given = {"lr": LR, "tau": TAU, "betas": BETAS, "weight_decay": DECAY, **PROJECT, **options}
        self.optimizer = AdamW2(named, **given)

    def _draw(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def step(self) -> list[tuple[Tensor, Tensor, MatrixStats]]:
        """Return, of every matrix, W before, the change but for decay, U and its statistics."""
        before = [param.detach().clone() for param in self.params]
        for param in self.params:
            param.grad = self._draw(param.shape)
        self.optimizer.step()
        stats = self.optimizer.stats()
        results = []
        for number, (param, old) in enumerate(zip(self.params, before, strict=True)):
            state, entry = self.optimizer.state[param], stats[f"w{number}"]
            count = float(state["step"])
            root = (state["exp_avg_sq"].double() / (1 - BETAS[1] ** count)).sqrt()
            update = state["exp_avg"].double() / (1 - BETAS[0] ** count) / (root + 1e-8)
            change = (1 - LR * DECAY) * old.double() - param.detach().double()
            results.append((change, update, entry))
        return results


@pytest.mark.parametrize(
    ("kernel", "dtype", "near_to"),
    [("torch", torch.float64, 1e-9), ("torch", torch.float32, 1e-3), ("cpu", torch.float32, 1e-3)],
    ids=str,
)
def test_with_vectors_for_all_singular_values_the_update_is_the_nearest_one_by_svd(
    kernel: str, dtype: torch.dtype, near_to: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    run = Run(dtype, vectors=64)
    for _ in range(6):
        for change, update, entry in run.step():
            if dtype == torch.float32 and update.shape == (20, 20):
                continue  # its smallest singular value is rounding in the square that is a Gram's
            left, values, right = torch.linalg.svd(LR * update, full_matrices=False)
            bound = entry.tau * max(entry.sigma_weight, 1e-3 * sum(n**0.5 for n in update.shape))
            nearest = (left * values.clamp(max=bound)) @ right
            error = float(torch.linalg.matrix_norm(change - nearest, 2)) / bound
            assert entry.clipped and error < near_to, (update.shape, error)
            assert entry.directions == int((values > bound * (1 + near_to)).sum())
            assert entry.share == pytest.approx(
                float(nearest.norm() / (LR * update.norm())), rel=near_to
            )
            assert entry.lr == pytest.approx(LR * entry.share)


@pytest.mark.parametrize("vectors", [1, 4, 8])
@pytest.mark.parametrize("kernel", ["torch", "cpu"])
def test_a_run_is_the_reference_s(
    kernel: str, vectors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weyl_megatron.reference import AdamW2Reference

    monkeypatch.setenv(VARIABLE, kernel)
    with tolerances.every_iteration():
        run = Run(torch.float32, vectors=vectors)
        twin = Run(torch.float64)
        named = [(f"w{number}", param) for number, param in enumerate(twin.params)]
        reference = AdamW2Reference(
            named,
            lr=LR,
            betas=BETAS,
            weight_decay=DECAY,
            tau=TAU,
            clip="project",
            vectors=vectors,
        )
        for _ in range(4):
            run.step()
            for param in twin.params:
                param.grad = twin._draw(param.shape)
            reference.step()
    for param, other in zip(run.params, twin.params, strict=True):
        scale = float(other.detach().abs().max())
        assert torch.allclose(param.double(), other, rtol=0, atol=1e-3 * scale), param.shape


def test_what_breaks_no_rule_is_adamw_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    scaled, projected = (Run(torch.float32, lr=1e-6, clip=clip) for clip in ("scale", "project"))
    for _ in range(5):
        for run in (scaled, projected):
            assert not any(entry.clipped for _, _, entry in run.step())
    for param, other in zip(scaled.params, projected.params, strict=True):
        assert torch.equal(param, other)
    entries = projected.optimizer.stats().values()
    assert {(entry.directions, entry.share, entry.unseen) for entry in entries} == {(0, 1, 1)}
    entries = scaled.optimizer.stats().values()
    assert {(entry.directions, entry.share, entry.unseen) for entry in entries} == {(None,) * 3}


def test_bfloat16_weights_are_moved_in_plain_torch() -> None:
    run, twin = Run(torch.bfloat16, vectors=64), Run(torch.float32, vectors=64)
    for _ in range(3):
        for (change, update, entry), _ in zip(run.step(), twin.step(), strict=True):
            assert entry.clipped and change.isfinite().all() and entry.share is not None
            bound = entry.lr * float(torch.linalg.matrix_norm(update)) + 1e-2
            assert float(change.norm()) < 2 * bound


#: Clipped from cold vectors, clipped, settled, clipped again.
RATES = [1e-2, 1e-2, 1e-5, 1e-5, 1e-2, 1e-2]


def steps(rank: Rank) -> list[State]:
    return [rank.step(lr) for lr in RATES]


@pytest.mark.parametrize("kernel", ["torch", "cpu"])
@pytest.mark.parametrize("cuts", [(0.43,), (0.2, 0.71), (0.05, 0.06, 0.9)], ids=str)
@pytest.mark.parametrize("vectors", [3, 8])
def test_matrices_cut_within_rows_are_projected_as_in_one_process(
    kernel: str, cuts: tuple[float, ...], vectors: int
) -> None:
    alone = Layout({"a": (13, 27), "b": (5, 9), "bias": (57,), "wide": (3, 264)}, tied=(6, 10))
    with tolerances.every_iteration():
        (expected,) = on_every_rank(alone, kernel, steps, **PROJECT, vectors=vectors)
        case = alone._replace(cuts=cuts)
        ranks = on_every_rank(case, kernel, steps, **PROJECT, vectors=vectors)
    for number, twin in enumerate(expected):
        states = [states[number] for states in ranks]
        for state in states:
            assert state.stats == states[0].stats, "ranks differ"
            assert torch.equal(state.tensors[2], states[0].tensors[2]), "copies differ"
        whole = State([torch.cat([state.tensors[1] for state in states])], twin.stats, twin.rate)
        check_alike(whole, State([twin.tensors[1]], twin.stats, twin.rate), 5e-6)
        assert near(states[0].tensors[2], twin.tensors[2], 5e-6)
        for name, entry in states[0].stats.items():
            assert entry.directions == twin.stats[name].directions
            assert entry.lr == pytest.approx(twin.stats[name].lr, rel=tolerances.ROUNDING)
    clipped = [any(entry.clipped for entry in state.stats.values()) for state in expected]
    assert clipped == [rate == 1e-2 for rate in RATES]


def test_no_more_collectives_than_where_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Layout({"a": (13, 27), "b": (5, 9), "bias": (57,)}, cuts=(0.43,))
    summed: list[int] = []
    all_reduce = Group.all_reduce

    def count(group: Group, tensor: Tensor) -> None:
        summed.append(len(tensor))
        all_reduce(group, tensor)

    monkeypatch.setattr(Group, "all_reduce", count)
    counts = {}
    for clip in ("scale", "project"):
        summed.clear()
        with tolerances.every_iteration():
            on_every_rank(case, "torch", steps, clip=clip, io=[])
        counts[clip] = len(summed)
    assert counts["project"] == counts["scale"] > 0


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    st.lists(st.floats(0, 1), max_size=2),
    st.integers(0, 3),
    st.sampled_from([1, 2, 4, 7, 8, 16]),
    st.sampled_from(["torch", "cpu"]),
)
def test_drawn_matrices_drawn_cuts(
    shapes: list[tuple[int, int]], cuts: list[float], gap: int, vectors: int, kernel: str
) -> None:
    alone = Layout({f"w{number}": shape for number, shape in enumerate(shapes)}, gap=gap)
    case = alone._replace(cuts=tuple(cuts))

    def two(rank: Rank) -> list[State]:
        return [rank.step(1e-2), rank.step(1e-2)]

    with tolerances.every_iteration():
        (expected,) = on_every_rank(alone, kernel, two, **PROJECT, vectors=vectors)
        ranks = on_every_rank(case, kernel, two, **PROJECT, vectors=vectors)
    for number, twin in enumerate(expected):
        assert all(states[number].stats == ranks[0][number].stats for states in ranks)
        whole = torch.cat([states[number].tensors[1] for states in ranks])
        # Where Y are almost parallel, rounding decides what counts as a direction.
        share = float((whole - twin.tensors[1]).abs().max() / twin.tensors[1].abs().max())
        assert share < 1e-3, share


@pytest.mark.parametrize("kernel", ["torch", "cpu"])
@pytest.mark.parametrize("world", [2, 3])
def test_real_ranks_agree_bit_for_bit(
    world: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernel)
    printed = run_ranks("torch", Path(__file__).with_name("project_worker.py"), world)
    assert "ranks agree" in printed
