"""torchrun worker: the cosine without warmup that the README gives, from JSON, at every ZeRO
stage.
"""

from __future__ import annotations

import json

import deepspeed

from tests import net as nets
from weyl_megatron.engines.shutdown import shutdown

SCHEDULER = {
    "type": "WarmupCosineLR",
    "params": {
        "total_num_steps": 8,
        "warmup_min_ratio": 1.0,
        "warmup_num_steps": 1,
        "cos_min_ratio": 0.1,
    },
}


def rates(stage: int) -> list[float]:
    config = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "optimizer": {"type": "AdamW2", "params": {"lr": 0.01, "tau": 0.01}},
        "scheduler": SCHEDULER,
        "zero_optimization": {"stage": stage},
    }
    net = nets.make_net()
    engine, _, _, _ = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config=config
    )
    seen = []
    for step in range(8):
        engine.backward(engine(nets.batches(1)[step, 0, 0]))
        seen.append(engine.basic_optimizer.param_groups[0]["lr"])
        engine.step()
    return seen


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    print("rates " + json.dumps([rates(stage) for stage in range(4)]))
    shutdown()


if __name__ == "__main__":
    main()
