"""torchrun worker: trains adapters under DeepSpeed, from JSON, for every case of
tests/engines/deepspeed/peft_net.py.

Usage: peft_worker.py OUT_DIR. Imports nothing to train with AdamW2: DeepSpeed finds it by its name.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from tests import tolerances
from tests.engines.deepspeed import peft_net
from weyl_megatron.engines.shutdown import shutdown


def train(case: dict[str, Any]) -> dict[str, Any]:
    net = peft_net.make(case["method"])
    config = {
        "train_micro_batch_size_per_gpu": peft_net.MICRO,
        "optimizer": {"type": "AdamW2", "params": peft_net.options(case)},
        "zero_optimization": {"stage": case["stage"]},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    parameters = [param for param in net.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=net, model_parameters=parameters, config=config)
    losses = []
    for batch in peft_net.batches():
        tokens = batch[dist.get_rank()]
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    everyone: list[Any] = [None] * dist.get_world_size()
    stats = {name: tuple(entry) for name, entry in engine.basic_optimizer.stats().items()}
    dist.all_gather_object(everyone, stats)
    return {
        "weights": {
            name: safe_get_full_fp32_param(p).clone()
            for name, p in peft_net.trained(engine.module).items()
        },
        "stats": everyone,
        "losses": losses,
    }


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    deepspeed.init_distributed("gloo")
    for case in peft_net.CASES:
        try:
            result = train(case)
        except Exception:
            result = {"error": traceback.format_exc()}
        if dist.get_rank() == 0:
            torch.save(result, Path(sys.argv[1]) / f"{case['name']}.pt")
        dist.barrier()


if __name__ == "__main__":
    main()
    shutdown()
