"""torchrun worker: a training script that knows megatron-core alone, and saves what it trained.

Usage: variable_worker.py OUT_DIR [OPTIMIZER [JSON]]; with the last, the options of the one line of
ours that it has then.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests import megatron_cpu

megatron_cpu.install()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402

STEPS = 4
CASES = {
    "dp2": {},
    "dp2-distopt": {"dist_opt": True},
    "tp2-bf16": {"tp": 2, "dtype": "bf16"},
    "ep2-distopt": {"ep": 2, "moe": True, "dist_opt": True},
}


def main(out: str, name: str = "adam", options: str = "") -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    if options:
        from weyl_megatron.engines import megatron

        megatron.enable(**json.loads(options))
    for case_name, case in CASES.items():
        gpt.start(case)
        model = gpt.build(case)
        dtype = gpt.DTYPES[case.get("dtype", "fp32")]
        config = OptimizerConfig(
            optimizer=name,
            lr=0.02,
            weight_decay=0.1,
            adam_beta2=0.95,
            adam_eps=1e-4,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=case.get("dist_opt", False),
        )
        optimizer = get_megatron_optimizer(config, model)
        for step in range(STEPS):
            optimizer.zero_grad()
            gpt.backward(step, case, model)
            optimizer.step()
        result = {
            "weights": gpt.whole(case, model),
            "inner": {type(each.optimizer).__name__ for each in optimizer.chained_optimizers},
            "name": config.optimizer,
        }
        if dist.get_rank() == 0:
            torch.save(result, Path(out, f"{case_name}.pt"))
    gpt.stop()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
