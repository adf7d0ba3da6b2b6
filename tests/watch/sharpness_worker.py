"""torchrun worker, 2 ranks: the Hessian of each rank's half of a batch, averaged, is that of the
joined batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch.sharpness import adam_preconditioner, sharpness


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (12,), generator=generator)


def measure(
    net: nn.Module, inputs: Tensor, targets: Tensor, group: dist.ProcessGroup | None
) -> tuple[float, float]:
    """Return the raw and the preconditioned sharpness after two steps of AdamW on the same data."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    preconditioner = adam_preconditioner(optimizer, parameters)
    raw, adam = (
        sharpness(
            lambda: nn.functional.cross_entropy(net(inputs), targets),
            parameters,
            iterations=100,
            preconditioner=given,
            group=group,
            tol=1e-12,
        )
        for given in (None, preconditioner)
    )
    assert all(parameter.grad is None for parameter in parameters)
    # DDP's hooks are not disturbed by gradients that it did not see.
    nn.functional.cross_entropy(net(inputs), targets).backward()
    optimizer.step()
    return raw, adam


def main() -> None:
    dist.init_process_group("gloo")
    inputs, targets = batch()
    expected = measure(make_net(), inputs, targets, None)
    rank = dist.get_rank()
    # No name for it: the module must be gone before the process group, or the process ends in an
    # abort.
    found = measure(
        DistributedDataParallel(make_net()), inputs[rank::2], targets[rank::2], dist.group.WORLD
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    everyone: list[object] = [None, None]
    dist.all_gather_object(everyone, found)
    assert everyone[0] == everyone[1]
    if rank == 0:
        print("two ranks see the joined batch")
    shutdown()


if __name__ == "__main__":
    main()
