"""torchrun worker, 2 ranks: DeepSpeed's MoE with an expert on each rank, ZeRO-1 and 2 against
ZeRO-0.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from tests import tolerances
from weyl_megatron.engines.shutdown import shutdown

STEPS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 12)
        expert = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 12))
        self.moe = MoE(12, expert=expert, num_experts=2, ep_size=2, k=1, capacity_factor=2.0)
        self.outer = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        routed, balance, _ = self.moe(x)
        return self.outer(x + routed).square().mean() + 0.01 * balance


def train(stage: int, tau: object = 0.01) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.manual_seed(0)
    net = Net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW2", "params": {"lr": 0.05, "tau": tau}},
        "zero_optimization": {"stage": stage},
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
    return {n: p.detach().clone() for n, p in net.named_parameters()}, {
        n: entry.lr for n, entry in stats.items()
    }


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    _, rates = train(0)
    tolerances.check_rates(train(1)[1], rates)  # as users train
    tolerances.make_every_iteration()  # so that no rounding decides on one
    weights, rates = train(0)
    experts = [name for name in rates if "deepspeed_experts" in name]
    assert len(experts) == 2, rates
    for stage in (1, 2):
        other, others = train(stage)
        for name, weight in weights.items():
            gap = float((other[name] - weight).norm() / weight.norm())
            assert gap < 1e-5, (stage, name, gap)  # float32 sums in another order
        assert all(abs(others[name] / rate - 1) < 1e-4 for name, rate in rates.items())
    refusal = ""
    try:
        train(1, "auto")
    except ValueError as error:
        refusal = str(error)
    if dist.get_rank() == 0:
        print("moe agrees; " + refusal)
    shutdown()


if __name__ == "__main__":
    main()
