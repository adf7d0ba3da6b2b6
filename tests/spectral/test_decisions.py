"""Where a rounding decides on one more iteration: what ranks do, and what it is worth.

Three ranks, which are threads, step a matrix of which each holds a range. A rounding is planted in
what one of them sums, and the threshold is set between the gains that come of it.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests import tolerances
from tests.faults import threads
from tests.faults.threads import Group, on_ranks, summing_groups
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.demo.model import GPT, GPTConfig
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard
from weyl_megatron.reference import AdamW2Reference, BlockPower
from weyl_megatron.spectral import power, ritz
from weyl_megatron.spectral.certificate import Certificate
from weyl_megatron.spectral.iterations import Iterations

RANKS, ROWS, COLS = 3, 23, 17

#: Where the ranges of the flattened matrix end: they cut rows.
EDGES = (0, 131, 260, ROWS * COLS)

#: Elements of Z and of Yᵀ Y of one operand.
OF_Z = COLS * power.BLOCK + power.BLOCK**2

#: Elements of U's Z that a rounding is planted in, one a run.
PLANTS = range(0, COLS * power.BLOCK, 9)

#: How much the second gradient differs from the first: its update's first iteration then gains
#: about ``ritz.SETTLED``.
CHANGE = 0.3


class Run(NamedTuple):
    """What the second of two steps was on one rank."""

    gain: float  #: of the update's first iteration, which decides on the second
    made: int  #: iterations of the update
    stats: MatrixStats
    weight: Tensor


class Recorder:
    """Notes, on every rank, what was decided on, and plants a rounding in what rank 1 sums."""

    def __init__(self, group: Group, element: int | None) -> None:
        self._element, self._sum = element, group.all_reduce
        self._making = Iterations.making
        self._sums_of_z = dict.fromkeys(range(RANKS), 0)
        self.gains: dict[int, list[float]] = {rank: [] for rank in range(RANKS)}
        self.made = dict.fromkeys(range(RANKS), 0)

    def all_reduce(self, tensor: Tensor) -> None:
        rank = threads._here.rank
        if len(tensor) == 2 * OF_Z:  # W's and, behind it, U's
            self._sums_of_z[rank] += 1
            is_second_step = self._sums_of_z[rank] == power.COLD_ITERS + 1
            if rank == 1 and is_second_step and self._element is not None:
                at = OF_Z + self._element
                tensor[at] = torch.nextafter(tensor[at], torch.tensor(torch.inf))
        self._sum(tensor)

    def making(self, plan: Iterations, number: int, gains: Tensor) -> dict[int, Tensor]:
        rank, making = threads._here.rank, self._making(plan, number, gains)
        if number == 0:
            self.gains[rank].clear()
            self.made[rank] = 0
        self.gains[rank].append(float(gains[1, 0]))
        self.made[rank] += 1 in making
        return making


def run(element: int | None, kernel: str, settled: float) -> list[Run]:
    """Return, of every rank, two steps with a rounding in ``element`` of the second one's first Z.

    The plan ends where an iteration gained no more than ``settled``.
    """
    group: Any = Group(range(RANKS))  # it stands in for a ProcessGroup
    torch.manual_seed(0)
    start, first, change = torch.randn(3, ROWS * COLS)
    recorder = Recorder(group, element)

    def on_rank(rank: int) -> Run:
        begin, end = EDGES[rank], EDGES[rank + 1]
        weight = nn.Parameter(start[begin:end].clone())
        shard = Shard(Parameter("w", (ROWS, COLS), None), begin, end, 0)
        optimizer = AdamW2([weight], lr=0.1, eps=1.0, betas=(0.0, 0.9))
        optimizer.engine = GivenLayout(lambda: Layout([Buffer(weight, (shard,), (group,))]))
        for grad in (first, first + CHANGE * change):
            weight.grad = grad[begin:end].clone()
            optimizer.step()
        gain = recorder.gains[rank][1]
        return Run(gain, recorder.made[rank], optimizer.stats()["w"], weight.detach().clone())

    with pytest.MonkeyPatch.context() as patched, summing_groups():
        patched.setenv(VARIABLE, kernel)
        patched.setattr(ritz, "SETTLED", settled)
        patched.setattr(group, "all_reduce", recorder.all_reduce)
        patched.setattr(Iterations, "making", lambda *given: recorder.making(*given))
        return on_ranks(RANKS, [group], on_rank)


def agreed(ranks: list[Run]) -> Run:
    """Return what all ranks were, which have to agree to the last bit; the weight of rank 0."""
    assert len({(each.gain, each.made, each.stats) for each in ranks}) == 1, ranks
    return ranks[0]


@pytest.fixture(scope="module", params=["cpu", "torch"])
def decided(request: pytest.FixtureRequest) -> tuple[float, list[list[Run]]]:
    """A threshold that lies among the gains of runs that differ by one rounding; these runs."""
    kernel = request.param
    gains = {agreed(run(element, kernel, ritz.SETTLED)).gain for element in PLANTS}
    settled = sorted(gains)[(len(gains) - 1) // 2]
    assert len(gains) > 1 and max(gains) - min(gains) < 1e-6, "roundings of float32 sums"
    assert 0.5 * ritz.SETTLED < settled < 2 * ritz.SETTLED
    return settled, [run(element, kernel, settled) for element in PLANTS]


def test_ranks_decide_alike_on_either_side_of_the_threshold(
    decided: tuple[float, list[list[Run]]],
) -> None:
    """A collective gives all of them the same bits: none waits for one that does not come."""
    _, runs = decided
    assert {agreed(ranks).made for ranks in runs} == {1, 2}


def test_a_decision_is_worth_what_one_iteration_gains_at_most(
    decided: tuple[float, list[list[Run]]],
) -> None:
    settled, runs = decided
    fewer = [agreed(ranks) for ranks in runs if ranks[0].made == 1]
    more = [agreed(ranks) for ranks in runs if ranks[0].made == 2]
    for lower, upper in itertools.product(fewer, more):
        gained = upper.stats.sigma_update / lower.stats.sigma_update - 1
        assert 0 < gained < tolerances.one_more(settled)
        assert lower.stats.lr / upper.stats.lr - 1 == pytest.approx(gained, rel=1e-3)
    gaps = [
        float(torch.linalg.matrix_norm(joined(first) - joined(second), 2))
        for first, second in itertools.combinations(runs, 2)
    ]
    # The matrix moved by 1 % of σ₁(W) in each of two steps, at rates that differ by the decision.
    assert 0 < max(gaps) < tolerances.weights(0.01, 2) * runs[0][0].stats.sigma_weight
    for runs_alike in (fewer, more):
        lrs = [each.stats.lr for each in runs_alike]
        assert max(lrs) / min(lrs) - 1 < 1e-6, "the same iterations leave roundings"


def joined(ranks: list[Run]) -> Tensor:
    return torch.cat([each.weight for each in ranks]).view(ROWS, COLS).double()


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_where_every_iteration_is_made_a_rounding_stays_one(kernel: str) -> None:
    with tolerances.every_iteration():
        runs = [agreed(run(element, kernel, ritz.SETTLED)) for element in PLANTS]
    assert {each.made for each in runs} == {2}
    lrs = [each.stats.lr for each in runs]
    assert 0 < max(lrs) - min(lrs) < 1e-6 * min(lrs)


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
@pytest.mark.parametrize("method", ["forecast", "settles"])
def test_the_certificate_s_decision_leaves_the_rate(
    method: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a rounding had brought the other answer: the matrix is measured, and moved at α too."""
    monkeypatch.setenv(VARIABLE, kernel)
    runs = []
    for is_decided_otherwise in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(ROWS, COLS))
        optimizer = AdamW2([("w", weight)], lr=1e-4, weight_decay=0.1)
        for step in range(4):
            weight.grad = torch.randn(ROWS, COLS)
            with pytest.MonkeyPatch.context() as patched:
                if step == 3 and is_decided_otherwise:
                    patched.setattr(Certificate, method, lambda self, lr, *_: lr < 0)
                optimizer.step()
        runs.append((optimizer.stats()["w"], weight.detach()))
    (certified, moved), (measured, other) = runs
    assert certified.certified and not measured.certified
    assert certified.lr == measured.lr == 1e-4
    # Taken back and moved again, an element is rounded twice more.
    assert torch.allclose(moved, other, rtol=0, atol=4 * torch.finfo(torch.float32).eps * 4)


@pytest.mark.parametrize(
    ("apart", "is_right"),
    [
        ({}, True),
        ({"a": 0.02}, True),  # one decision
        ({"a": 0.021}, False),  # more than that is worth
        ({"a": 2e-4, "b": 2e-4, "c": 2e-4}, False),  # everything is off
    ],
    ids=str,
)
def test_rates_of_another_layout_may_differ_by_a_decision(
    apart: dict[str, float], is_right: bool
) -> None:
    expected = dict.fromkeys("abcd", 0.01)
    rates = {name: rate * (1 + apart.get(name, 5e-5)) for name, rate in expected.items()}
    if is_right:
        tolerances.check_rates(rates, expected)
    else:
        with pytest.raises(AssertionError, match="more than"):
            tolerances.check_rates(rates, expected)


def test_the_demo_s_iterations_gain_less_and_less() -> None:
    """What :func:`tolerances.one_more` is derived from, on the updates of a training run."""
    stops, most = 0, 0.0
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    optimizer = AdamW2Reference(
        model.named_parameters(), lr=3e-3, sigma=lambda name, iters: Followed(name, iters)
    )
    corpus = load_corpus()
    for offsets in training_offsets(corpus, 12, 8, 64, seed=0):
        model.zero_grad()
        model(*sequences(corpus.train, offsets, 64)).backward()
        optimizer.step()
    for _, of_update in optimizer.sigma.values():
        stops += len(of_update.more)
        for gained, more in of_update.more:
            assert more < tolerances.one_more(max(gained, 1e-5)), "of its own gain"
            most = max(most, more)
    print(f"{stops} iterations were the last; one more would have gained {most:.2%} at most")
    assert stops > 100 and most < tolerances.one_more()


class Followed(BlockPower):
    """Notes, where it stops early, what it gained and what one iteration more would have gained."""

    def __init__(self, name: str, iters: int = 2) -> None:
        super().__init__(name, iters)
        self.more: list[tuple[float, float]] = []

    def __call__(self, matrix: Tensor) -> float:
        is_warm = self.block is not None
        before = self.block
        sigma = super().__call__(matrix)
        if is_warm and self.iters > 1:
            left = torch.linalg.qr(matrix @ before).Q
            only = torch.linalg.matrix_norm(matrix.T @ left, 2)
            gained = 1 - float(torch.linalg.matrix_norm(matrix @ before, 2) / only)
            if gained <= ritz.SETTLED:
                left = torch.linalg.qr(matrix @ self.block).Q
                more = float(torch.linalg.matrix_norm(matrix.T @ left, 2)) / sigma - 1
                self.more.append((gained, more))
        return sigma
