"""torchrun worker: trains, saves, goes on; then a new engine loads what was saved and goes on, too,
for every case.

Usage: resume_worker.py CASES.json OUT_DIR. Imports nothing to train with AdamW2: DeepSpeed finds it
by its name.
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
from torch import Tensor

from tests.faults import runs
from weyl_megatron.engines.shutdown import shutdown

SAVED, MORE = 4, 4


def resume(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what of the resumed run is not bit for bit the run that went on, on every rank."""
    engine = runs.engine(case)
    for step in range(SAVED):
        runs.train_step(engine, step)
    engine.save_checkpoint(str(folder))
    at_save = snapshot(engine)
    stats, losses = steps(engine)
    went_on = snapshot(engine)

    resumed = runs.engine(case)
    resumed.load_checkpoint(str(folder))
    at_load = snapshot(resumed)
    stats_resumed, losses_resumed = steps(resumed)

    loaded, ended = unlike(at_save, at_load), unlike(went_on, snapshot(resumed))
    mine = {
        "loaded": loaded,
        "ended": ended,
        "stats": stats == stats_resumed,
        "losses": losses == losses_resumed,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    last = stats[-1].values()
    return {
        "ranks": everyone,
        "tensors": len(went_on),
        "moved": not torch.equal(went_on["module wte.weight"], at_save["module wte.weight"]),
        "wrapper": type(engine.optimizer).__name__,
        "steppings": len(list(engine.basic_optimizer._matrix_groups)),
        "matrices": {
            "all": len(last),
            "clipped": sum(x[3] for x in last),
            "certified": sum(x[5] for x in last),
        },
    }


def steps(engine: Any) -> tuple[list[Any], list[float]]:
    stats, losses = [], []
    for step in range(SAVED, SAVED + MORE):
        losses.append(runs.train_step(engine, step))
        stats.append({name: tuple(entry) for name, entry in engine.basic_optimizer.stats().items()})
    return stats, losses


def snapshot(engine: Any) -> dict[str, Tensor]:
    """Copies of this rank's weights, of those that the optimizer steps, and of its whole state,
    steps included.
    """
    found = {
        f"module {name}": getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()
    }
    for number, (master, state) in enumerate(engine.basic_optimizer.state.items()):
        found[f"master {number}"] = master
        found |= {f"{key} {number}": torch.as_tensor(value) for key, value in state.items()}
    return {key: value.detach().clone() for key, value in found.items()}


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [
        key
        for key in one.keys() | other.keys()
        if key not in one or not torch.equal(one[key], other.get(key))
    ]


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=10), verbose=False)
    for case in cases:
        try:
            result = resume(case, out / "checkpoints" / case["name"])
        except Exception:
            result = {"error": traceback.format_exc()}
            print(f"case {case['name']}, rank {dist.get_rank()}: {result['error']}", flush=True)
        if dist.get_rank() == 0:
            (out / f"{case['name']}.json").write_text(json.dumps(result))
        dist.barrier()
    shutdown()


if __name__ == "__main__":
    main()
