"""Triton's kernels clip singular values as plain torch does, and as singular value decomposition
has it; under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests import tolerances
from tests.faults.threads import Group, on_ranks, summing_groups
from tests.kernels.cases import OPTIONS, State, check_alike, on_every_rank
from tests.kernels.cases import Case as Layout
from tests.kernels.interpreter import few_iterations, needs_interpreter, quick_interpreter
from tests.kernels.test_project import LR, PROJECT, RATES, Run, steps
from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.layouts.buffers import Buffer, Parameter, Shard, Spread
from weyl_megatron.layouts.buffers import Layout as Given

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_interpreter(), tolerances.every_iteration(), few_iterations():
        yield


def test_with_vectors_for_all_singular_values_the_update_is_the_nearest_one_by_svd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    run = Run(torch.float32, vectors=16)
    for _ in range(2):
        for change, update, entry in run.step():
            if min(update.shape) > 16:
                continue
            left, values, right = torch.linalg.svd(LR * update, full_matrices=False)
            bound = entry.tau * max(entry.sigma_weight, 1e-3 * sum(n**0.5 for n in update.shape))
            nearest = (left * values.clamp(max=bound)) @ right
            error = float(torch.linalg.matrix_norm(change - nearest, 2)) / bound
            assert entry.clipped and error < 1e-3, (update.shape, error)
            assert entry.directions == int((values > bound * (1 + 1e-3)).sum())
            share = float(nearest.norm() / (LR * update.norm()))
            assert entry.share == pytest.approx(share, rel=1e-3)
            assert entry.lr == pytest.approx(LR * share, rel=1e-3)


@pytest.mark.parametrize("vectors", [1, 4, 8])
def test_a_run_is_plain_torch_s(vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for kernel in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, kernel)
        runs.append(Run(torch.float32, vectors=vectors))
        for _ in range(3):
            runs[-1].step()
    plain, fused = runs
    for number, (param, other) in enumerate(zip(plain.params, fused.params, strict=True)):
        scale = float(param.detach().abs().max())
        assert torch.allclose(param, other, rtol=0, atol=1e-3 * scale), param.shape
        entry, twin = (run.optimizer.stats()[f"w{number}"] for run in runs)
        assert entry.directions == twin.directions and entry.clipped == twin.clipped
        assert entry.share == pytest.approx(twin.share, rel=2e-3)
        assert entry.unseen == pytest.approx(twin.unseen, rel=2e-2)


@pytest.mark.parametrize("cuts", [(0.43,), (0.2, 0.71)], ids=str)
def test_matrices_cut_within_rows_are_projected_as_in_one_process(cuts: tuple[float, ...]) -> None:
    alone = Layout({"a": (13, 27), "b": (5, 9), "bias": (57,), "wide": (3, 264)})
    (expected,) = on_every_rank(alone, "torch", steps, **PROJECT, vectors=3)
    ranks = on_every_rank(alone._replace(cuts=cuts), "triton", steps, **PROJECT, vectors=3)
    for number, twin in enumerate(expected):
        states = [states[number] for states in ranks]
        assert all(state.stats == states[0].stats for state in states), "ranks differ"
        whole = State([torch.cat([state.tensors[1] for state in states])], twin.stats, twin.rate)
        check_alike(whole, State([twin.tensors[1]], twin.stats, twin.rate), 5e-6)
    clipped = [any(entry.clipped for entry in state.stats.values()) for state in expected]
    assert clipped == [rate == 1e-2 for rate in RATES]


def test_what_the_kernels_do_not_project_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="vectors got 17, the kernels for a GPU take at most 16"):
        Run(torch.float32, vectors=17).step()


@pytest.mark.parametrize("cuts", [(0.43,), (0.2, 0.71)], ids=str)
def test_copies_that_another_rank_measures_are_moved_as_they_are_there(
    cuts: tuple[float, ...],
) -> None:
    """Bit for bit, W, M and V, early, projected and settled; HSDP has such copies of all."""
    alone = Layout({"a": (13, 27), "bias": (57,)}, tied=(33, 40))
    (expected,) = on_every_rank(alone, "torch", steps, **PROJECT, vectors=3)
    ranks = on_every_rank(alone._replace(cuts=cuts), "triton", steps, **PROJECT, vectors=3)
    for number, twin in enumerate(expected):
        first, *others = [states[number] for states in ranks]
        for other in others:
            assert other.stats == first.stats
            # The memory, the row, the copy; M and V of the row and of the copy.
            for place in (2, 5, 6):
                assert torch.equal(first.tensors[place], other.tensors[place]), (number, place)
        whole = State([first.tensors[place] for place in (2, 5, 6)], twin.stats, twin.rate)
        of_twin = State([twin.tensors[place] for place in (2, 5, 6)], twin.stats, twin.rate)
        check_alike(whole, of_twin, 5e-6)
    clipped = [state.stats["tied"].clipped for state in expected]
    assert clipped == [rate == 1e-2 for rate in RATES]


def test_copies_of_pieces_that_cut_rows_are_moved_by_the_sums_of_all_ranks() -> None:
    """Two copies of a matrix in two pieces each, on four ranks, as HSDP by columns has them."""
    shape, size = (9, 40), 360
    edges = [0, int(0.43 * size), size]
    shards, copies = [Group([0, 1]), Group([2, 3])], [Group([0, 2]), Group([1, 3])]
    drawn = torch.Generator().manual_seed(0)
    whole = torch.randn(size, generator=drawn) * 0.05
    grads = [torch.randn(size, generator=drawn) for _ in RATES]

    def train(rank: int | None) -> list[State]:
        part = slice(None) if rank is None else slice(*edges[rank % 2 : rank % 2 + 2])
        spreads, groups = [], []
        if rank is not None:
            spreads, groups = [Spread(copies[rank % 2], rank // 2, True)], [shards[rank // 2]]
        param = nn.Parameter(whole[part].clone())
        parameter = Parameter("w", shape, spreads=tuple(spreads))
        shard = Shard(parameter, part.start or 0, part.stop or size, 0)
        optimizer = AdamW2([param], **OPTIONS, **PROJECT, vectors=3)
        optimizer.engine = GivenLayout(lambda: Given([Buffer(param, (shard,), tuple(groups))]))
        states = []
        for lr, grad in zip(RATES, grads, strict=True):
            param.grad = grad[part].clone()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            moments = [optimizer.state[param][key] for key in ("exp_avg", "exp_avg_sq")]
            tensors = [tensor.detach().clone() for tensor in (param, *moments)]
            states.append(State(tensors, optimizer.stats(), lr))
        return states

    with patch.dict("os.environ", {VARIABLE: "torch"}):
        expected = train(None)
    with patch.dict("os.environ", {VARIABLE: "triton"}), summing_groups():
        ranks = on_ranks(4, [*shards, *copies], train)
    for number, twin in enumerate(expected):
        states = [states[number] for states in ranks]
        assert all(state.stats == states[0].stats for state in states)
        for state, copy in zip(states[:2], states[2:], strict=True):
            assert all(map(torch.equal, state.tensors, copy.tensors)), number
        pairs = zip(states[0].tensors, states[1].tensors, strict=True)
        check_alike(State(list(map(torch.cat, pairs)), states[0].stats, twin.rate), twin, 5e-6)
