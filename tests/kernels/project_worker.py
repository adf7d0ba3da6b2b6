"""torchrun worker: matrices that are cut between ranks, projected, against one process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from tests import tolerances
from tests.kernels.cases import Case, Rank, State, on_every_rank
from tests.kernels.ranks_worker import CUTS, near
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.kernels.choice import VARIABLE

#: Clipped from cold vectors, clipped, settled, clipped again.
RATES = [1e-2, 1e-2, 1e-5, 1e-5, 1e-2, 1e-2]

OPTIONS: dict[str, Any] = {"clip": "project", "vectors": 8, "io": []}


def run(rank: Rank) -> list[State]:
    return [rank.step(lr) for lr in RATES]


def main() -> None:
    dist.init_process_group("gloo")
    number, world = dist.get_rank(), dist.get_world_size()
    alone = Case({"a": (13, 27), "b": (5, 9), "bias": (57,), "wide": (3, 264)}, tied=(6, 10))
    case = alone._replace(cuts=CUTS[world])
    with tolerances.every_iteration():
        states, again = (run(Rank(case, number, dist.group.WORLD, **OPTIONS)) for _ in range(2))
        for state, twin in zip(states, again, strict=True):
            assert state.stats == twin.stats, "another run has other rates"
            assert all(map(torch.equal, state.tensors, twin.tensors)), "another run, other bits"
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, states)
        if number == 0:
            for of_rank in gathered:
                for state, first in zip(of_rank, gathered[0], strict=True):
                    assert state.stats == first.stats, "a rank has other rates, or σ₁"
                    assert torch.equal(state.tensors[2], first.tensors[2])
            (expected,) = on_every_rank(alone, os.environ[VARIABLE], run, **OPTIONS)
            for step, twin in enumerate(expected):
                of_ranks = [states[step] for states in gathered]
                near(torch.cat([state.tensors[1] for state in of_ranks]), twin.tensors[1])
                near(of_ranks[0].tensors[2], twin.tensors[2])
                clipped = [entry.directions for entry in of_ranks[0].stats.values()]
                assert clipped == [entry.directions for entry in twin.stats.values()]
                assert any(clipped) == (RATES[step] == 1e-2)
            print("ranks agree")
    shutdown()


if __name__ == "__main__":
    main()
