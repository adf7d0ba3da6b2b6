"""torchrun worker, 4 ranks: a NaN in one element of one gradient on one rank, under
megatron-core.
"""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests import megatron_cpu

megatron_cpu.install()

from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from tests.engines.megatron.train_worker import optimizer_config  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.engines.shutdown import shutdown  # noqa: E402

STEPS, BAD = 5, (1, 3)
POISONED = {
    "dense": "decoder.layers.1.mlp.linear_fc2.weight",
    "moe": "decoder.layers.1.mlp.experts.local_experts.0.",
}

CASES: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2-bf16": {"tp": 2, "dtype": "bf16"},
    "tp2-distributed": {"tp": 2, "dist_opt": True},
    "distributed-bf16": {"dist_opt": True, "dtype": "bf16"},
    "pp2-distributed": {"pp": 2, "dist_opt": True},
    "experts": {"ep": 2, "moe": True, "dist_opt": True},
    "tp2-fp16": {"tp": 2, "dtype": "fp16"},  # Megatron's loss scaler finds it, and skips
}


def run(
    case: dict[str, Any],
    value: float | None,
    steps: int = STEPS,
    bad: tuple[int, ...] = BAD,
) -> list[Tensor]:
    """Train; on the steps in ``bad``, put ``value`` into a gradient on the last rank; None: leave
    these steps out.
    """
    gpt.start(case)
    model = gpt.build(case)
    optimizer = get_megatron_optimizer(optimizer_config(case), model)
    poisoned = [False]

    def poison(grad: Tensor) -> Tensor:
        if poisoned[0]:
            grad = grad.clone()
            grad.view(-1)[3] = value
        return grad

    if dist.get_rank() == dist.get_world_size() - 1:
        named = [(name, one) for chunk in model for name, one in chunk.named_parameters()]
        chosen = [
            one for name, one in named if POISONED["moe" if case.get("moe") else "dense"] in name
        ]
        chosen[0].register_hook(poison)
    for step in range(steps):
        if step in bad and value is None:
            continue
        poisoned[0] = step in bad
        optimizer.zero_grad()
        gpt.backward(step, case, model)
        optimizer.step()
    inner = [one.optimizer for one in optimizer.chained_optimizers]
    if case.get("dtype") != "fp16":  # which Megatron's scaler skips before the optimizer is asked
        assert [one.skipped_steps for one in inner] == [0 if value is None else len(bad)] * len(
            inner
        )
    moments = [
        state[key]
        for one in inner
        for state in one.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return [
        one.detach().clone()
        for one in [*(one for chunk in model for one in chunk.parameters()), *moments]
    ]


def main() -> None:
    dist.init_process_group("gloo")
    logging.basicConfig(level=logging.WARNING)
    megatron.enable(tau=0.02)
    for name, case in CASES.items():
        without = run(case, None)
        for value in (math.nan, math.inf):
            with_it = run(case, value)
            if (
                case.get("dtype") == "fp16"
            ):  # a step that was skipped halves the loss scale, and so the rounding
                same = all(bool(one.isfinite().all()) for one in with_it)
            else:
                same = all(
                    torch.equal(one, other) for one, other in zip(without, with_it, strict=True)
                )
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, same)
            if dist.get_rank() == 0:
                print(
                    f"{name}, {value}: "
                    + ("as without that step" if all(everyone) else f"DIFFERS {everyone}")
                )
    sys.stdout.flush()
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
