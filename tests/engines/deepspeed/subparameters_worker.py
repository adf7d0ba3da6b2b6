"""torchrun worker: a weight of which DeepSpeed's AutoTP cuts every part by itself trains as its
parts do in one process.

    torchrun --nproc_per_node=2 tests/engines/deepspeed/subparameters_worker.py
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

WIDTH, STEPS = 10, 6
#: Rows of q, k and v: every head of k and v has three of q.
SIZES = [12, 4, 4]
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": [0.9, 0.95], "weight_decay": 0.1, "tau": 0.01}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, sum(SIZES), bias=False)
        self.out = nn.Linear(SIZES[0], WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x)
        heads = packed.shape[-1] // 5  # of k and v on this rank
        q, k, v = packed.split([3 * heads, heads, heads], -1)
        k, v = (part.repeat_interleave(3, -1) for part in (k, v))
        y: Tensor = x + self.out(torch.tanh(q * k) * v)
        return y


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor, x: Tensor) -> Tensor:
    return (output - x.roll(1, -1)).square().mean()


def one_process() -> tuple[Net, dict[str, Any]]:
    net = make()
    split = [{"match": "qkv.weight", "fused": SIZES}]
    optimizer = AdamW2(net.named_parameters(), **OPTIONS, overrides=split)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net(batch(step)), batch(step)).backward()
        optimizer.step()
    return net, optimizer.stats()


def under_autotp(stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights, gathered, and the last step's statistics."""
    rules = [
        {
            "patterns": [r"qkv\.weight$"],
            "partition_type": "column",
            "shape": [SIZES, -1],
            "partition_dim": 0,
        },
        {"patterns": [r"out\.weight$"], "partition_type": "row"},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW2", "params": OPTIONS},
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {"use_default_specs": False, "layer_specs": rules},
        },
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = deepspeed.initialize(model=make(), config=config)
    for step in range(STEPS):
        engine.backward(loss_of(engine(batch(step)), batch(step)))
        engine.step()
    shares: list[Any] = [None, None]
    held = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    assert {name: weight.shape[0] for name, weight in held.items()} == {
        "qkv.weight": 10,
        "out.weight": WIDTH,
    }
    dist.all_gather_object(shares, held)
    parts = [share["qkv.weight"].split([size // 2 for size in SIZES]) for share in shares]
    whole = {
        "qkv.weight": torch.cat([part for pair in zip(*parts, strict=True) for part in pair]),
        "out.weight": torch.cat([share["out.weight"] for share in shares], 1),
    }
    stats: dict[str, Any] = engine.basic_optimizer.stats()
    return whole, stats


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    deepspeed.init_distributed("gloo")
    net, expected = one_process()
    for stage in (0, 1):
        weights, stats = under_autotp(stage)
        assert set(stats) == {*(f"qkv.weight[{part}]" for part in range(3)), "out.weight"}
        assert any(entry.clipped for entry in stats.values())
        for name, entry in stats.items():
            # Sums are made in another order.
            assert abs(entry.sigma_weight / expected[name].sigma_weight - 1) < 1e-5, name
            assert abs(entry.lr / expected[name].lr - 1) < 1e-4, name
        for name, param in net.named_parameters():
            assert float((weights[name] - param).norm() / param.norm()) < 1e-5, name
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
