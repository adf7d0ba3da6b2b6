"""torchrun worker: DeepSpeed's pipeline engine, 2 stages, against the one-process reference;
scaled and projected; tau="auto" is refused.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import nn

from tests import tolerances
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.reference import AdamW2Reference

WIDTHS = [(9, 14), (14, 9), (9, 11), (11, 5)]
STEPS, ACCUMULATION, MICRO = 6, 2, 3

#: No layer here is an embedding. Four vectors see no matrix whole.
PROJECT = {"clip": "project", "vectors": 4}


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(*width), nn.Tanh()) for width in WIDTHS]


def batch(step: int, micro: int, replica: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + replica)
    return torch.randn(MICRO, 9, generator=generator), torch.randn(MICRO, 5, generator=generator)


def reference(replicas: int, **clip: Any) -> dict[str, torch.Tensor]:
    net = nn.Sequential(*layers())
    optimizer = AdamW2Reference(net.named_parameters(), lr=0.05, weight_decay=0.1, **clip)
    for step in range(STEPS):
        net.zero_grad()
        for micro in range(ACCUMULATION):
            for replica in range(replicas):
                x, y = batch(step, micro, replica)
                (nn.functional.mse_loss(net(x), y) / (ACCUMULATION * replicas)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def train(stage: int, tau: Any, **clip: Any) -> None:
    module = PipelineModule(
        layers=layers(), num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    params = {"lr": 0.05, "weight_decay": 0.1, "tau": tau, **clip}
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW2", "params": params},
        "zero_optimization": {"stage": stage},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    # On gloo, DeepSpeed before 0.19 gathers into a buffer that requires grad, which torch allows
    # under no_grad alone.
    engine.optimizer.step = torch.no_grad()(engine.optimizer.step)
    replica, replicas = (
        dist.get_rank(engine.grid.get_data_parallel_group()),
        dist.get_world_size() // 2,
    )
    for step in range(STEPS):
        engine.train_batch(iter([batch(step, micro, replica) for micro in range(ACCUMULATION)]))
    expected = reference(replicas, **clip)
    for name, p in engine.module.named_parameters():
        gap = float((p.detach() - expected[name]).norm() / expected[name].norm())
        assert gap < 1e-5, (stage, clip, name, gap)  # float32 sums in another order
    stats = engine.basic_optimizer.stats().values()
    assert any(entry.clipped for entry in stats)
    if clip:
        assert all(entry.directions is not None and 0 < entry.unseen <= 1 for entry in stats)
        assert any(entry.directions and entry.unseen < 1 for entry in stats)


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in (0, 1):
        train(stage, 0.01)
        train(stage, 0.01, **PROJECT)
    try:
        train(1, "auto")
    except ValueError as error:
        refusal = str(error)
    if dist.get_rank() == 0:
        print("pipeline follows; " + refusal)
    shutdown()


if __name__ == "__main__":
    main()
