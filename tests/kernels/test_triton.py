"""Whole steps in Triton's kernels against plain torch, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import tolerances
from tests.kernels.cases import OPTIONS, Case, Rank, State, check_alike, on_every_rank
from tests.kernels.interpreter import few_iterations, needs_interpreter, quick_interpreter
from weyl_megatron import AdamW2, MatrixStats, host_step
from weyl_megatron.kernels import choice, passes

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # So that small matrices are several units.
    monkeypatch.setattr(passes, "_LEAST_ELEMENTS", 512)
    with quick_interpreter(), tolerances.every_iteration():
        yield


def undecided(stats: dict[str, MatrixStats], tau: float = OPTIONS["tau"]) -> float:
    """Return a rate at which half of the matrices are expected to be settled (Certificate.forecast
    lets U grow by 5 %), after a step in which they were.
    """
    moved = [entry for entry in stats.values() if entry.sigma_update > 0]
    rates = [tau * entry.sigma_weight / entry.sigma_update for entry in moved]
    return sorted(rates)[len(rates) // 2] / 1.051


def through_all_states(rank: Rank) -> list[State]:
    """Make a step of cold vectors, one that is settled, one in which matrices are taken back, as
    their U grows eightfold, and one of vectors that are older.
    """
    states = [rank.step(1e-2), rank.step(1e-7, sign=-1)]
    states.append(rank.step(undecided(states[-1].stats), sign=1))
    return [*states, rank.step(1e-2)]


CASES = {
    "whole": Case({"a": (24, 48), "b": (37, 22), "wide": (16, 304), "bias": (9,), "c": (8, 3)}),
    "cut within a row": Case({"a": (33, 57), "b": (5, 9), "bias": (57,)}, (0.37,), 1),
    "cut often": Case({"a": (20, 70), "b": (3, 3), "wide": (9, 272)}, (0.2, 0.9), 3),
    "aligned cuts": Case({"a": (32, 64), "b": (8, 264)}, (0.25,), 8),
    "narrow": Case(
        {"a": (1, 1), "row": (1, 70), "column": (70, 1), "two": (2, 40), "three": (41, 3)}, (), 1
    ),
    "strided": Case(
        {"qkv": (14, 66), "experts": (3, 12, 18), "bias": (66,)},
        (0.3,),
        overrides=(
            {"match": "qkv", "fused": [22, 22, 22]},
            {"match": "experts", "kind": "experts"},
        ),
    ),
    "strided, aligned": Case(
        {"qkv": (10, 96)}, overrides=({"match": "qkv", "fused": [32, 32, 32]},)
    ),
    "copies": Case({"a": (12, 20)}, (0.5,), tied=(9, 14), still=(7, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_plain_torch(name: str) -> None:
    case = CASES[name]
    taken_back: list[bool] = []
    take_back = host_step.HostStep._take_back

    def note(self: host_step.HostStep, failed: Tensor) -> None:
        taken_back.append(bool(failed.any()))
        take_back(self, failed)

    with few_iterations():
        with patch.object(host_step.HostStep, "_take_back", note):
            expected = on_every_rank(case, "torch", through_all_states)
        rates = [state.rate for state in expected[0]]

        def at_their_rates(rank: Rank) -> list[State]:
            signs = (0.0, -1.0, 1.0, 0.0)
            return [rank.step(*each) for each in zip(rates, signs, strict=True)]

        states = on_every_rank(case, "triton", at_their_rates)
    # Or else not all states were gone through.
    assert any(taken_back) and all(entry.certified for entry in expected[0][1].stats.values())
    assert any(entry.clipped for entry in expected[0][3].stats.values())
    for of_rank, of_twin in zip(states, expected, strict=True):
        for state, twin in zip(of_rank, of_twin, strict=True):
            check_alike(state, twin)
        # What ranks share they have alike, bit for bit.
        assert of_rank[-1].stats == states[0][-1].stats
        assert (of_rank[-1].tensors[0][: case.gap] == 7).all()


extents = st.integers(1, 30)


@settings(max_examples=4)
@given(
    st.lists(st.tuples(extents, extents), min_size=1, max_size=2),
    st.lists(st.floats(0.05, 0.95), max_size=2),
    st.integers(0, 9),
)
def test_steps_on_drawn_layouts_are_those_of_plain_torch(
    shapes: list[tuple[int, int]], cuts: list[float], gap: int
) -> None:
    case = Case({f"w{number}": shape for number, shape in enumerate(shapes)}, tuple(cuts), gap)

    def steps(rank: Rank) -> list[State]:
        return [rank.step(1e-2), rank.step(1e-7)]

    with few_iterations():
        states, expected = (on_every_rank(case, kernel, steps) for kernel in ("triton", "torch"))
    for of_rank, of_twin in zip(states, expected, strict=True):
        for state, twin in zip(of_rank, of_twin, strict=True):
            check_alike(state, twin)


def test_norms_of_a_step_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that spikes are found in, which a device tells two steps later."""

    def stepped(kernel: str) -> AdamW2:
        monkeypatch.setenv(choice.VARIABLE, kernel)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        optimizer = AdamW2(net.named_parameters(), lr=1e-2, spike="log")
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return optimizer

    with few_iterations():
        expected, told = stepped("torch").stats(), stepped("triton").stats()
    for name, entry in told.items():
        # Sums of 30 float32 squares, in another order.
        assert entry.update_norm == pytest.approx(expected[name].update_norm, rel=1e-5)
        assert entry.update_ratio == pytest.approx(expected[name].update_ratio, rel=1e-5)
