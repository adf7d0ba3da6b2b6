"""torchrun worker: watches models that torch's tensor parallelism spreads, under AdamW² for three
steps, under torch's AdamW for one; writes the last measurement, and what is refused.

Usage: tp_worker.py OUT_DIR. One process watches the models whole; the global batch is the same at
any number of processes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.watch import plain_adamw
from tests.watch.tp_models import ADAMW, CASES, REFUSED, Case, made
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch.watch import Watch

STEPS = {"adamw2": 3, "adamw": 1}


def batch(step: int, case: Case) -> Tensor:
    """What this rank computes of the global batch."""
    tokens = torch.randint(50, (8, 13), generator=torch.Generator().manual_seed(step))
    parts = dist.get_world_size() // 2 if case.data else 1
    return tokens.chunk(parts)[dist.get_rank() // 2 if case.data else 0]


def measured(case: Case, kind: str, folder: Path) -> dict[str, float]:
    model = made(case, dist.get_world_size())
    optimizer = plain_adamw.made(kind, list(model.named_parameters()))
    watch = Watch(model, optimizer, every=1, maps=[0, 3], out=folder)
    values: dict[str, float] = {}
    for step in range(STEPS[kind]):
        with attention_of(case):
            loss = plain_adamw.loss_of(model, batch(step, case))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values = dict(watch.step(loss))
    watch.close()
    return values


@contextmanager
def attention_of(case: Case) -> Iterator[None]:
    """Of DTensors the CPU has no other attention than this, whose mask is a plain tensor."""
    if case.name != "on mesh":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), implicit_replication():
        yield


def said(case: Case) -> str:
    model = made(case, dist.get_world_size())
    try:
        watch = Watch(model)
        try:
            model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
        finally:
            watch.close()
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    folder, ranks = Path(sys.argv[1]), dist.get_world_size()
    for case in CASES[ranks]:
        for kind in ("adamw2", "adamw") if case.name in ADAMW else ("adamw2",):
            values = measured(case, kind, folder / f"{case.name}-{kind}")
            if dist.get_rank() == 0:
                (folder / f"{case.name}-{kind}.json").write_text(json.dumps(values))
    refused = {case.name: said(case) for case in REFUSED[ranks]}
    if dist.get_rank() == 0:
        (folder / f"said{ranks}.txt").write_text(json.dumps(refused))
    shutdown()


if __name__ == "__main__":
    main()
