"""torchrun worker, 2 ranks: DeepSpeed's MoE with an expert on each rank, ZeRO-1 and 2 against
ZeRO-0; with tau="balanced" also against both experts on each rank.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from tests import tolerances
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.engines.shutdown import shutdown

STEPS = 5


class Net(nn.Module):
    def __init__(self, ranks: int = 2) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 12)
        expert = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 12))
        self.moe = MoE(12, expert=expert, num_experts=2, ep_size=ranks, k=1, capacity_factor=2.0)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        routed, balance, _ = self.moe(x)
        return self.head(x + routed).square().mean() + 0.01 * balance


def train(
    stage: int, options: dict[str, Any] | None = None, ranks: int = 2
) -> tuple[dict[str, Tensor], dict[str, MatrixStats]]:
    torch.manual_seed(0)
    net = Net(ranks)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW2", "params": {"lr": 0.05, "tau": 0.01, **(options or {})}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config=config
    )
    for step in range(STEPS):
        torch.manual_seed(10 * step + dist.get_rank())
        engine.backward(engine(torch.randn(4, 9)))
        with torch.no_grad():  # DeepSpeed before 0.19 needs it on gloo
            engine.step()
    stats = engine.basic_optimizer.stats()
    assert any(entry.clipped for entry in stats.values())
    return {n: p.detach().clone() for n, p in net.named_parameters()}, stats


def rates_of(stats: dict[str, MatrixStats]) -> dict[str, float]:
    return {name: entry.lr for name, entry in stats.items()}


def check_balanced(stage: int) -> None:
    """Compare thresholds with those of a process that has both experts, and the run with one in
    which each rank has.
    """
    # Higher, so that the larger thresholds clip; the gate is a matrix like any other.
    options = {"tau": "balanced", "lr": 0.3, "eps": 1e-12}
    torch.manual_seed(0)
    net = Net(1)
    alone = AdamW2(net.named_parameters(), **options, model=net)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    alone.step()
    taus = {name: entry.tau for name, entry in alone.stats().items()}
    weights, stats = train(stage, options)
    whole, of_whole = train(0, options, ranks=1)
    expert = dist.get_rank()  # this rank's, which is its first
    for name, weight in weights.items():
        other = name.replace("deepspeed_experts.0.", f"deepspeed_experts.{expert}.")
        gap = float((weight - whole[other]).norm() / whole[other].norm())
        # float32 sums in another order, and of experts' gradients another multiple beside eps
        assert gap < 1e-5, (stage, name, gap)
        if name in stats:
            assert stats[name].tau == of_whole[other].tau == taus[other], (name, stats[name].tau)
            assert abs(stats[name].lr / of_whole[other].lr - 1) < 1e-4


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    _, stats = train(0)
    tolerances.check_rates(rates_of(train(1)[1]), rates_of(stats))  # as users train
    tolerances.make_every_iteration()  # so that no rounding decides on one
    weights, stats = train(0)
    experts = [name for name in stats if "deepspeed_experts" in name]
    assert len(experts) == 2, stats
    for stage in (1, 2):
        other, others = train(stage)
        for name, weight in weights.items():
            gap = float((other[name] - weight).norm() / weight.norm())
            assert gap < 1e-5, (stage, name, gap)  # float32 sums in another order
        assert all(abs(others[name].lr / entry.lr - 1) < 1e-4 for name, entry in stats.items())
    for stage in (0, 1, 2):
        check_balanced(stage)
    if dist.get_rank() == 0:
        print("moe agrees")
    shutdown()


if __name__ == "__main__":
    main()
