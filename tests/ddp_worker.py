"""torchrun worker, 2 ranks: DDP against the one-process reference; FSDP1 must be refused, not
misread.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
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
