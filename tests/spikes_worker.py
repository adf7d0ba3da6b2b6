"""torchrun worker: a jump of a gradient's piece is skipped by all ranks alike, and all know the
same norms, under FSDP2, HSDP and tensor parallelism.

    torchrun --nproc_per_node=N tests/spikes_worker.py
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.torch.mesh_nonfinite_worker import gathered, held
from tests.engines.torch.meshes import VOCABULARY, Net, fsdp, fsdp_tp, hsdp, tp
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

#: By the number of ranks: how the model is spread, and whose gradient jumps on odd ranks.
CASES: dict[int, dict[str, tuple[Callable[[Net, int], None], str]]] = {
    2: {"fsdp": (fsdp, "h.0.qkv.weight"), "tensor parallelism": (tp, "h.0.proj.weight")},
    4: {
        "hsdp": (hsdp, "h.0.experts"),
        "fsdp and tensor parallelism": (fsdp_tp, "h.0.down.weight"),
    },
}

STEPS, BAD = 50, (45, 46)


def made(spread: Callable[[Net, int], None] | None, mode: str | None) -> tuple[Net, AdamW2]:
    torch.manual_seed(0)
    net = Net()
    if spread is not None:
        spread(net, dist.get_world_size())
    return net, AdamW2(net.named_parameters(), lr=1e-2, tau=0.03, spike=mode)


def backward(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (2, 6), generator=generator)
    out = net(tokens)
    # Gradients that stay of one size.
    (out * torch.randn(out.shape, generator=generator)).sum().backward()


def steps_of(net: Net, optimizer: AdamW2, name: str, factor: float, left_out: bool) -> None:
    """Train; in the steps in BAD odd ranks' pieces of one gradient are too large."""
    parameters = dict(net.named_parameters())
    for step in range(STEPS):
        if left_out and step in BAD:
            continue
        optimizer.zero_grad()
        backward(net, step)
        if step in BAD and dist.get_rank() % 2 == 1:  # of HSDP both copies
            held(parameters[name].grad).mul_(factor)
        optimizer.step()


def everything(net: Net, optimizer: AdamW2) -> list[Tensor]:
    moments = [
        held(state[key]).clone()
        for state in optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return [*(held(param).detach().clone() for param in net.parameters()), *moments]


def check(case: str, spread: Callable[[Net, int], None], name: str) -> None:
    net, optimizer = made(spread, "skip")
    steps_of(net, optimizer, name, 1e3, left_out=False)
    assert gathered(optimizer.skipped_steps) == [len(BAD)] * dist.get_world_size(), (
        case,
        optimizer.skipped_steps,
    )
    stats = gathered(optimizer.stats())
    assert all(entries == stats[0] for entries in stats), case
    without = made(spread, "skip")
    steps_of(*without, name, 1e3, left_out=True)
    pairs = zip(everything(net, optimizer), everything(*without), strict=True)
    assert all(gathered(all(torch.equal(*pair) for pair in pairs))), f"{case}: it was not skipped"

    whole = made(None, "log")
    steps_of(*whole, name, 1.0, left_out=True)
    expected = whole[1].stats()
    assert stats[0].keys() == expected.keys(), case
    for matrix, entry in stats[0].items():
        # Other sums of float32 squares, and what a step makes of that in 48 steps.
        for key in ("update_norm", "update_ratio"):
            value, wanted = getattr(entry, key), getattr(expected[matrix], key)
            assert abs(value - wanted) <= 1e-4 * wanted, (case, matrix, key, value, wanted)
    if dist.get_rank() == 0:
        print(f"{case}: {optimizer.spikes[0]}", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    dist.init_process_group("gloo")
    for case, (spread, name) in CASES[dist.get_world_size()].items():
        check(case, spread, name)
    print("all skip alike", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
