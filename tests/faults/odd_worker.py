"""torchrun worker, 3 ranks: DeepSpeed with parameters that some ranks, or some steps, have nothing
of.

Every loss is Σ p · c of numbers c that depend on the step, the rank and the parameter, so that the
gradients are known and one process can be told them: their mean over the ranks, 0 where a rank has
none. Where no rank has one, ZeRO-3 steps with the last one again (DeepSpeed 0.19.8, with torch's
AdamW as well).
"""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from tests import tolerances
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.reference import AdamW2Reference, exact_sigma

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": [0.9, 0.95], "weight_decay": 0.1, "tau": 0.01}

#: What DeepSpeed itself cannot do: gather a parameter of size zero (ZeRO-3); reduce other buckets
#: on other ranks.
EXCEPT = {("empty", 3), *(("one rank", stage) for stage in (1, 2, 3))}

#: Which parameters a case has.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "few": {"w": (2, 1)},
    "empty": {"w": (7, 4), "none": (0, 4), "last": (3, 5)},
    "sometimes": {"w": (7, 4), "branch": (5, 3)},
    "one rank": {"w": (7, 4), "branch": (5, 3)},
    "never": {"w": (7, 4), "branch": (5, 3)},
}


def has_gradient(case: str, name: str, step: int, rank: int) -> bool:
    if name != "branch":
        return True
    return {"sometimes": step % 2 == 0, "one rank": rank != 1 or step % 2 == 0}.get(case, False)


def factor(name: str, step: int, rank: int, shape: tuple[int, ...]) -> Tensor:
    seed = 1000 * step + 10 * rank + len(name)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.shapes = case, SHAPES[case]
        for number, (name, shape) in enumerate(self.shapes.items()):
            start = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, step: int, rank: int) -> Tensor:
        chosen = [name for name in self.shapes if has_gradient(self.case, name, step, rank)]
        return sum((getattr(self, n) * factor(n, step, rank, self.shapes[n])).sum() for n in chosen)  # type: ignore[return-value]


def expected(case: str, stage: int, world: int) -> dict[str, Tensor]:
    net = Net(case)
    reference = AdamW2Reference(net.named_parameters(), **OPTIONS, sigma=lambda *_: exact_sigma)
    for step in range(STEPS):
        for name, p in net.named_parameters():
            ranks = [rank for rank in range(world) if has_gradient(case, name, step, rank)]
            total = sum(
                (factor(name, step, rank, tuple(p.shape)) for rank in ranks), torch.zeros_like(p)
            )
            if ranks or p.grad is None or stage < 3:
                p.grad = total / world if p.numel() else None
        reference.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def train(case: str, stage: int) -> dict[str, Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW2", "params": OPTIONS},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "steps_per_print": 10**9,
    }
    net = Net(case)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    for step in range(STEPS):
        engine.backward(engine(step, dist.get_rank()))
        engine.step()
    if stage == 0:
        return {name: p.detach() for name, p in engine.module.named_parameters()}
    if stage == 3:
        return {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    return {
        name: safe_get_full_fp32_param(p)
        for name, p in engine.module.named_parameters()
        if p.numel()
    }


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found: dict[str, float | str] = {}
    for case in SHAPES:
        for stage in range(4):
            if (case, stage) in EXCEPT:
                continue
            try:
                weights, right = train(case, stage), expected(case, stage, dist.get_world_size())
                off = [
                    float((w - right[n]).norm() / right[n].norm())
                    for n, w in weights.items()
                    if right[n].numel()
                ]
                found[f"{case} {stage}"] = max(off)
            except Exception as error:
                found[f"{case} {stage}"] = f"{type(error).__name__}: {error}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print("odd " + json.dumps(everyone), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
