"""torchrun worker: AdamW's checkpoint into AdamW2, its checkpoint into AdamW, and again, under
every ZeRO stage.

Usage: switch_worker.py STAGES OUT_DIR. Imports nothing to train with AdamW2: DeepSpeed finds it by
its name.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from tests.faults import runs
from tests.faults.resume_worker import snapshot, unlike
from weyl_megatron.engines.shutdown import shutdown

ADAMW: dict[str, Any] = {"optimizer": "AdamW"}
INFINITE: dict[str, Any] = {"params": {"tau": float("inf"), "overrides": []}}


def switch(stage: int, folder: Path) -> dict[str, Any]:
    """Return what differs where nothing should, on every rank."""
    adamw = trained({"stage": stage, **ADAMW}, range(4))
    adamw.save_checkpoint(str(folder), tag="adamw")
    saved = snapshot(adamw)
    steps(adamw, range(4, 7))

    infinite = loaded({"stage": stage, **INFINITE}, folder, "adamw")
    steps(infinite, range(4, 7))

    ours = loaded({"stage": stage}, folder, "adamw")
    into_adamw2 = unlike(saved, snapshot(ours))
    steps(ours, range(4, 7))
    clipped = sum(entry.clipped for entry in ours.basic_optimizer.stats().values())
    ours.save_checkpoint(str(folder), tag="adamw2")

    back = loaded({"stage": stage, **ADAMW}, folder, "adamw2")
    into_adamw = unlike(snapshot(ours), snapshot(back))
    steps(back, range(7, 9))
    back.save_checkpoint(str(folder), tag="back")

    again = loaded({"stage": stage}, folder, "back")
    and_again = unlike(snapshot(back), snapshot(again))
    steps(again, range(9, 11))
    forgets = loaded({"stage": stage}, folder, "back")
    forgets.basic_optimizer.forget()
    steps(forgets, range(9, 11))

    mine = {
        "infinite tau": unlike(snapshot(adamw), snapshot(infinite)),
        "into adamw2": into_adamw2,
        "into adamw": into_adamw,
        "and again": and_again,
        "old vectors": unlike(snapshot(again), snapshot(forgets)),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    passed_on = "adamw2_power" in back.basic_optimizer.param_groups[0]
    return {"clipped": clipped, "passed on": passed_on} | {
        key: [one[key] for one in everyone] for key in mine
    }


def trained(case: dict[str, Any], numbers: range) -> Any:
    engine = runs.engine(case)
    steps(engine, numbers)
    return engine


def loaded(case: dict[str, Any], folder: Path, tag: str) -> Any:
    engine = runs.engine(case)
    engine.load_checkpoint(str(folder), tag=tag)
    return engine


def steps(engine: Any, numbers: range) -> None:
    for step in numbers:
        runs.train_step(engine, step)


def main() -> None:
    stages, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=10), verbose=False)
    found = {}
    for stage in stages:
        try:
            found[stage] = switch(stage, out / f"stage{stage}")
        except Exception:
            found[stage] = {"error": traceback.format_exc()}
            print(f"stage {stage}, rank {dist.get_rank()}: {found[stage]['error']}", flush=True)
        dist.barrier()
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
