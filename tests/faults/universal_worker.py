"""torchrun worker: one leg of a run that changes its number of ranks, for every case.

Usage: universal_worker.py CASES.json OUT_DIR LEG. A leg has ``load`` (a step, whose universal
checkpoint is loaded), ``until`` (the step up to which it trains) and ``save`` (the step at which it
saves); it records the whole state at every step. Imports nothing to train with AdamW2: DeepSpeed
finds it by its name.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from tests import tolerances
from tests.faults import runs
from weyl_megatron.engines.shutdown import shutdown


def train(case: dict[str, Any], leg: dict[str, Any], folder: Path) -> dict[str, Any]:
    engine = runs.engine({**case, "universal": "load" in leg})
    first, found = leg.get("load", 0), {}
    if "load" in leg:
        engine.load_checkpoint(str(folder), tag=f"step_{first}_universal")
        found["groups"] = [
            {key: value for key, value in group.items() if key in ("lr", "tau", "weight_decay")}
            for group in engine.basic_optimizer.param_groups
        ]
        if case["stage"] == 3:  # DeepSpeed gave every group the values of the first
            engine.basic_optimizer.param_groups[1]["weight_decay"] = 0.0
        found[first] = whole_state(engine)
    for step in range(first, leg["until"]):
        runs.train_step(engine, step)
        stats = engine.basic_optimizer.stats() if hasattr(engine.basic_optimizer, "stats") else {}
        found[step + 1] = {
            **whole_state(engine),
            "stats": {name: tuple(entry) for name, entry in stats.items()},
        }
        if step + 1 == leg.get("save"):
            engine.save_checkpoint(str(folder), tag=f"step_{step + 1}")
    return found


def whole_state(engine: Any) -> dict[str, Any]:
    """The masters and moments of whole parameters, from all ranks, and every step count of this
    one.
    """
    found: dict[str, Any] = {"steps": [], "state": {}}
    for state in engine.basic_optimizer.state.values():
        found["steps"].append(float(state["step"]))
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed does this after the first parameter group's first step, when the second has no
        # moments yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        found["state"][name] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found["state"][f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    cases, out, leg = (
        json.loads(Path(sys.argv[1]).read_text()),
        Path(sys.argv[2]),
        json.loads(sys.argv[3]),
    )
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=10), verbose=False)
    for case in cases:
        try:
            result = train(case, leg, out / case["name"])
        except Exception:
            result = {"error": traceback.format_exc()}
            print(f"case {case['name']}, rank {dist.get_rank()}: {result['error']}", flush=True)
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case['name']}-{leg['name']}.pt")
        dist.barrier()
    shutdown()


if __name__ == "__main__":
    main()
