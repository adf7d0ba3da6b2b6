"""torchrun worker: configurations that AdamW2 must refuse under DeepSpeed, each with the sentence that it raises."""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch

from tests import net as nets
from weyl_megatron.integrations.leave import leave

CASES: dict[str, dict[str, Any]] = {
    "unknown key": {"optimizer": {"tua": 0.01}},
    "max_grad_norm": {"optimizer": {"max_grad_norm": 1.0}},
    "adam_w_mode": {"optimizer": {"adam_w_mode": False}},
    "moved weights": {"zero": {"stage": 2}, "move": True},
    "unknown wrapper": {"zero": {"stage": 2}, "rename": True},
}


def refuse(case: dict[str, Any]) -> str:
    config = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "optimizer": {"type": "AdamW2", "params": {"lr": 1e-3, **case.get("optimizer", {})}},
        "zero_optimization": case.get("zero", {}),
    }
    net = nets.make_net()
    try:
        engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
        if case.get("move"):
            with torch.no_grad():
                engine.module.head.weight.add_(1.0)
        if case.get("rename"):
            # A wrapper of a later DeepSpeed that this release of AdamW2 has never seen.
            type(engine.optimizer).__name__ = "ZeroOptimizerOfTheFuture"
        engine.backward(engine(nets.batches(1)[0, 0, 0]))
        engine.step()
    except ValueError as error:
        return str(error)
    return "stepped"


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    print("refusals " + json.dumps({name: refuse(case) for name, case in CASES.items()}))
    leave()


if __name__ == "__main__":
    main()
