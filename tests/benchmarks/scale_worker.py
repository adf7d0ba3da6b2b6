"""torchrun worker, 4 ranks: what benchmarks/scale.py counts on stand-ins, counted on real
processes, sums and steps.

Every rank writes what it counted to a file in the folder that is named.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.scale import Groups, buffers_of, io_of, parameter_of, pieces_of
from benchmarks.scale_count import CLIPS, OPTIONS, Counted, vectors_of
from benchmarks.scale_models import Spread, gpt
from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.layouts.buffers import Buffer, Layout
from weyl_megatron.settings import PROJECT

MODEL = gpt(2, 24, 2, tokens=50, context=8)

SPREADS = [
    *(Spread(dp=dp, zero=zero) for zero in "13" for dp in (2, 3)),
    *(Spread(tp=2, dp=2, zero=zero) for zero in ("1", "ddp")),
    Spread(pp=2, dp=2),
]

#: Rates at which nothing, and everything, is clipped.
RATES = {"certified": 1e-7, "measured": 1.0}


def count(
    buffers: list[Buffer], state: str, clip: str, io: list[str]
) -> tuple[Counted, list[list[int]]]:
    """Count the second of two real steps; return also the rows that the ranks found to be cut."""
    tensors = [buffer.tensor for buffer in buffers]
    optimizer = AdamW2(tensors, lr=RATES[state], clip=clip, io=io, **OPTIONS)
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, **options: object) -> object:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, **options)

    for _ in range(2):
        for buffer in buffers:
            buffer.tensor.grad = torch.randn_like(buffer.tensor)
        sent.clear()
        with patch.object(dist, "all_reduce", counted):
            optimizer.step()
    stats = optimizer.stats()
    assert {entry.certified for entry in stats.values()} == {state == "certified"}
    if clip == PROJECT:
        hidden = {name for name in stats if name.startswith("layers.")}
        projected = {name: entry.directions for name, entry in stats.items()}
        assert {name for name, directions in projected.items() if directions is not None} == hidden
        assert all(projected[name] for name in hidden) == (state == "measured") or not hidden
    (matrix_group,) = optimizer._matrix_groups
    cut = [rows.tolist() for rows in matrix_group._power.blocks.cut]
    return Counted(len(sent), sum(sent), vectors_of(matrix_group)), cut


def groups_of(spread: Spread) -> Groups:
    """Make all groups of the job, which is collective over all processes; return this rank's."""
    tp, pp, dp, _ = spread
    grid = torch.arange(tp * pp * dp).view(pp, dp, tp)
    made = []
    for rows in (
        grid.reshape(-1, tp),
        grid.transpose(1, 2).reshape(-1, dp),
        grid.permute(1, 2, 0).reshape(-1, pp),
    ):
        groups = [(ranks, dist.new_group(ranks)) for ranks in rows.tolist()]
        made.append(next((group for ranks, group in groups if dist.get_rank() in ranks), None))
    return Groups(made[0], made[1], made[2] if pp > 1 else None)


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for number, spread in enumerate(SPREADS):
        groups = groups_of(spread)
        if rank >= spread.tp * spread.pp * spread.dp:
            continue
        stage, place = divmod(rank, spread.tp * spread.dp)
        weights = MODEL.stage(stage, spread.pp)
        parameters = [parameter_of(weight, spread, place % spread.tp, groups) for weight in weights]
        counts = {}
        for clip, state in product(CLIPS, RATES):
            torch.manual_seed(rank)
            buffers = buffers_of(
                parameters,
                spread.zero,
                groups.data,
                lambda length: nn.Parameter(torch.randn(length)),
            )
            counts[f"{clip} {state}"], cut = count(buffers, state, clip, io_of(weights))
        held = [
            (shard.start, shard.stop)
            for buffer in buffers
            for shard in buffer.shards
            if shard.start < shard.stop
        ]
        pieces = [piece for of_one in pieces_of(weights, spread) for piece in of_one]
        assert held == [
            (start, stop) for holder, start, stop in pieces if holder == place // spread.tp
        ]
        report = {"spread": number, "stage": stage, "cut": cut, **counts}
        (folder / f"{number}-{rank}.json").write_text(json.dumps(report))
    shutdown()


if __name__ == "__main__":
    main()
