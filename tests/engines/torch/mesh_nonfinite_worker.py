"""torchrun worker: a NaN in one rank's gradients is refused by all ranks alike, under FSDP2, HSDP
and tensor parallelism.

    torchrun --nproc_per_node=N tests/engines/torch/mesh_nonfinite_worker.py
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engines.torch.meshes import (
    OVER_TENSOR_PARALLELISM,
    VOCABULARY,
    Net,
    fsdp,
    fsdp_tp,
    hsdp,
    tp,
)
from tests.logged import Lines
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

#: By the number of ranks: how the model is spread, and whose gradient is not finite on the last.
CASES: dict[int, dict[str, tuple[Callable[[Net, int], None], str]]] = {
    2: {
        "fsdp": (fsdp, "h.0.qkv.weight"),
        "fsdp, a vector": (fsdp, "h.0.norm.bias"),
        "tensor parallelism": (tp, "h.0.proj.weight"),
        "tensor parallelism, whole": (tp, "lone.weight"),
    },
    4: {
        "hsdp": (hsdp, "h.0.experts"),
        "fsdp and tensor parallelism": (fsdp_tp, "h.0.down.weight"),
        "fsdp beside tensor parallelism": (fsdp_tp, "h.0.conv.weight"),
    },
}


def held(param: Any) -> Tensor:
    return param.to_local() if hasattr(param, "to_local") else param


def gathered(item: Any) -> list[Any]:
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def backward(net: nn.Module, factor: float = 1.0) -> None:
    tokens = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    (net(tokens).square().mean() * factor).backward()


def made(spread: Callable[[Net, int], None], mode: str) -> tuple[Net, AdamW2]:
    torch.manual_seed(0)
    net = Net(**(OVER_TENSOR_PARALLELISM if spread is fsdp_tp else {}))
    spread(net, dist.get_world_size())
    return net, AdamW2(net.named_parameters(), lr=1e-2, tau=0.03, nonfinite=mode)


def check(case: str, spread: Callable[[Net, int], None], name: str) -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    net, optimizer = made(spread, "skip")
    parameters = dict(net.named_parameters())
    lines = Lines()
    logger = logging.getLogger("weyl_megatron")
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    for step in range(3):
        optimizer.zero_grad()
        backward(net)
        if step == 1:
            before = [held(param).detach().clone() for param in parameters.values()]
            if last:
                grad = held(parameters[name].grad)
                assert grad.numel(), f"{case}: the last rank has nothing of {name}"
                grad.view(-1)[-1] = math.nan
        optimizer.step()
        if step == 1:
            for old, param in zip(before, parameters.values(), strict=True):
                assert torch.equal(old, held(param)), f"{case}: a skipped step moved"
    logger.removeHandler(lines)
    (line,) = (text for text in lines.texts if "a step is skipped, number 1 in a row" in text)
    assert (name if last else "a parameter on another rank") in line, (case, line)
    assert optimizer.skipped_steps == 1
    counts = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    assert set(counts) == {2.0}, (case, counts)
    stats = gathered(optimizer.stats())
    assert stats[0] and all(entries == stats[0] for entries in stats), case
    assert all(math.isfinite(entry.sigma_weight) for entry in stats[0].values())

    net, optimizer = made(spread, "raise")
    backward(net, math.nan if last else 1.0)  # which every rank's share of the mean has
    try:
        optimizer.step()
    except FloatingPointError as error:
        text = str(error)
    else:
        raise AssertionError(f"{case}: nothing was raised")
    assert "the gradient of " in text and "with nonfinite='skip'" in text, (case, text)
    assert all(bool(held(param).isfinite().all()) for param in net.parameters())
    if dist.get_rank() == 0:
        print(f"{case}: {line}; {text}", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for case, (spread, name) in CASES[dist.get_world_size()].items():
        check(case, spread, name)
    print("all refuse alike", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
