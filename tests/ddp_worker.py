"""torchrun worker, 2 ranks: DDP, and torch's ZeroRedundancyOptimizer, against the one-process
reference; FSDP1 must be refused, not misread.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tests import net as nets
from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown


def ddp() -> None:
    net = nets.make_net()
    model = DistributedDataParallel(net)
    groups = nets.parameter_groups(net)
    names = {id(p): name for name, p in model.named_parameters()}  # with DDP's "module." in front
    for group in groups:
        group["params"] = [(names[id(p)], p) for p in group["params"]]  # type: ignore[attr-defined]
    optimizer = AdamW2(groups, **nets.OPTIONS)
    for global_batch in nets.batches(2):
        optimizer.zero_grad()
        for micro in global_batch[:, dist.get_rank()]:
            (model(micro) / nets.ACCUMULATION).backward()
        optimizer.step()
    expected, _ = nets.one_process(2)
    for name, weight in net.named_parameters():
        # float32 sums in another order
        assert (weight - expected[name]).norm() / expected[name].norm() < 1e-5, name
    everyone: list[object] = [None, None]
    dist.all_gather_object(everyone, optimizer.stats())
    assert everyone[0] == everyone[1]
    assert set(optimizer.stats()) == {"embed.weight", "up.weight", "down.weight", "head.weight"}


def partitioned(tau: object, **others: object) -> str:
    """torch's ZeRO-1, whose ranks have other parameters each, as one process; return what is said
    in its first step.
    """
    alone = nets.make_net()
    model = DistributedDataParallel(copy.deepcopy(alone))
    options: dict[str, Any] = {"lr": 0.01, "tau": tau}
    single = AdamW2(alone.parameters(), model=alone, **options)
    spread = ZeroRedundancyOptimizer(model.parameters(), AdamW2, model=model, **options, **others)
    for batches in nets.batches(2):
        single.zero_grad()
        spread.zero_grad()
        for micro in batches.flatten(0, 1):
            alone(micro).backward()
            model(micro).backward()
        single.step()
        try:
            spread.step()
        except ValueError as error:
            return str(error)
    entries = spread.optim.stats()
    expected = {name: single.stats()[name].tau for name in entries}
    assert entries and {name: entry.tau for name, entry in entries.items()} == expected
    for weight, other in zip(alone.parameters(), model.parameters(), strict=True):
        assert (weight - other).norm() / weight.norm() < 1e-5  # float32 sums in another order
    return "nothing"


def refused(params: object, grad_of: list[torch.Tensor]) -> bool:
    optimizer = AdamW2(params)  # type: ignore[arg-type]
    for param in grad_of:
        param.grad = torch.zeros_like(param)
    try:
        optimizer.step()
    except ValueError as error:
        return "does not understand" in str(error)
    return False


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    dist.init_process_group("gloo")
    ddp()
    assert partitioned(0.02) == "nothing"
    assert partitioned("balanced", budget_group=dist.group.WORLD) == "nothing"
    assert "ZeroRedundancyOptimizer, whose ranks" in partitioned("balanced")
    flat = FullyShardedDataParallel(
        nets.make_net(), device_id=torch.device("cpu"), use_orig_params=False
    )
    original = FullyShardedDataParallel(
        nets.make_net(), device_id=torch.device("cpu"), use_orig_params=True
    )
    fsdp1 = all(
        refused(model.named_parameters(), list(model.parameters())) for model in (flat, original)
    )
    if dist.get_rank() == 0:
        print("ddp follows one process")
        print("fsdp1 refused" if fsdp1 else "fsdp1 was stepped")
    shutdown()


if __name__ == "__main__":
    main()
