"""torchrun worker, in an environment with TRITON_INTERPRET=1: matrices that are cut between ranks,
under Triton's kernels, against one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests import tolerances
from tests.kernels.cases import Case, Rank, State, on_every_rank
from tests.kernels.interpreter import few_iterations, quick_interpreter
from weyl_megatron.engines.shutdown import shutdown

#: Clipped from cold vectors, clipped, settled until all is sure, clipped again.
RATES = [1e-2, 1e-2, *[1e-5] * 6, 1e-2]

#: By the number of ranks, cut within rows.
CUTS = {2: (0.43,), 3: (0.2, 0.71)}


def run(rank: Rank) -> tuple[list[State], list[bool]]:
    """Return the states after every step, and in which no iteration was launched."""
    states, sure = [], []
    for lr in RATES:
        states.append(rank.step(lr))
        (group,) = rank.optimizer._matrix_groups
        sure.append(bool(getattr(group._step, "_is_all_sure", False)))
    return states, sure


def main() -> None:
    dist.init_process_group("gloo")
    number, world = dist.get_rank(), dist.get_world_size()
    alone = Case({"a": (13, 27), "b": (5, 9), "bias": (57,), "wide": (3, 264)}, tied=(6, 10))
    case = alone._replace(cuts=CUTS[world])
    with quick_interpreter(), few_iterations(), tolerances.every_iteration():
        (states, sure), (again, _) = (run(Rank(case, number, dist.group.WORLD)) for _ in range(2))
        for state, twin in zip(states, again, strict=True):
            assert state.stats == twin.stats, "another run has other rates"
            assert all(map(torch.equal, state.tensors, twin.tensors)), "another run, other bits"
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (states, sure))
        if number == 0:
            check(gathered, case)
            ((expected, _),) = on_every_rank(alone, "torch", run)
            compare(gathered, expected)
            print("ranks agree")
    shutdown()


def check(gathered: list[tuple[list[State], list[bool]]], case: Case) -> None:
    """Check that ranks have what they share alike, bit for bit, and went through all states."""
    for states, sure in gathered:
        assert sure == gathered[0][1]
        for state, first in zip(states, gathered[0][0], strict=True):
            assert state.stats == first.stats, "a rank has other rates, or σ₁"
            tied, tied_first = state.tensors[2], first.tensors[2]
            assert tied.shape == case.tied and torch.equal(tied, tied_first)
    states, sure = gathered[0]
    clipped = [any(entry.clipped for entry in state.stats.values()) for state in states]
    assert clipped == [rate == 1e-2 for rate in RATES]
    assert sure[-2] and not sure[-1] and not sure[0], sure
    assert all(entry.certified for entry in states[-2].stats.values())


def compare(gathered: list[tuple[list[State], list[bool]]], expected: list[State]) -> None:
    """Check that together they have what one process has, to roundings."""
    for step, twin in enumerate(expected):
        states = [states[step] for states, _ in gathered]
        whole = torch.cat([state.tensors[1] for state in states])
        near(whole, twin.tensors[1])
        near(states[0].tensors[2], twin.tensors[2])
        rates = {name: entry.lr for name, entry in states[0].stats.items()}
        tolerances.check_rates(rates, {name: entry.lr for name, entry in twin.stats.items()})


def near(tensor: Tensor, expected: Tensor) -> None:
    # Nine steps' sums in another order, and Adam's division by √V.
    rounding = 5e-6 * float(expected.abs().max())
    assert torch.allclose(tensor, expected, rtol=0, atol=rounding)


if __name__ == "__main__":
    main()
