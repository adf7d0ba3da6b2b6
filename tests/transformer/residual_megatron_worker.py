"""torchrun worker: one pass of tests/engines/megatron/gpt.py with scaled residuals; writes
gradients of its norm.

Usage: residual_megatron_worker.py OUT_DIR CASE…
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


from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.transformer.residual import scale_residuals  # noqa: E402

CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({}, None),
    "forward": ({}, "forward"),
    "init": ({}, "init"),
    "tp2-sp": ({"tp": 2, "sp": True}, "forward"),
    "pp2": ({"pp": 2}, "forward"),
}


def measured(case: dict[str, Any], mode: str | None) -> dict[str, float]:
    """How many branches were scaled, and the norms of ∂γ and ∂β of the norm in front of the head
    (the last rank's).
    """
    gpt.start(case)
    model = gpt.build(case)
    branches = 0 if mode is None else scale_residuals(model[0], mode=mode)
    gpt.backward(0, case, model)
    named = {
        name.rpartition(".")[2]: p
        for name, p in model[0].named_parameters()
        if "final_layernorm" in name
    }
    norms = {kind: float(param.main_grad.norm()) for kind, param in named.items()}
    return {"branches": branches, **norms}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        values = measured(*CASES[name])
        if dist.get_rank() == dist.get_world_size() - 1:
            (folder / f"{name}.json").write_text(json.dumps(values))
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
