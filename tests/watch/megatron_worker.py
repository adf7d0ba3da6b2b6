"""torchrun worker: watches two steps of tests/engines/megatron/gpt.py; writes the second
measurement.

Usage: megatron_worker.py OUT_DIR CASE…
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import megatron_cpu
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.watch.watch import Watch  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "tp2-distopt": {"tp": 2, "dist_opt": True},
    "dp2-distopt": {"dist_opt": True},
}


def measured(case: dict[str, Any]) -> dict[str, float]:
    gpt.start(case)
    megatron.enable(tau=0.01)
    model = gpt.build(case)
    config = OptimizerConfig(
        optimizer="adamw2",
        lr=0.02,
        adam_eps=1e-4,
        clip_grad=0.0,
        use_distributed_optimizer=case.get("dist_opt", False),
    )
    optimizer = get_megatron_optimizer(config, model)
    get_model_config(model[0]).grad_scale_func = optimizer.scale_loss
    watch = Watch(model, optimizer, every=1)
    values: dict[str, float] = {}
    for step in range(2):
        optimizer.zero_grad()
        gpt.backward(step, case, model)
        optimizer.step()
        values = dict(watch.step())
    watch.close()
    return values


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        values = measured(CASES[name])
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(values))
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
