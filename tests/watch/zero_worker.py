"""torchrun worker: watches two steps of examples/collapse's GPT under DeepSpeed, scaled and
projected; writes the second measurement of each.

Usage: zero_worker.py OUT_DIR STAGE… The global batch is the same at any number of processes.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch.watch import Watch


def measured(stage: int, folder: Path, label: str, **options: Any) -> dict[str, float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    model = GPT(GPTConfig(norm="pre", vocabulary=50, context=16, layers=3, heads=2, width=24))
    config = {
        "train_micro_batch_size_per_gpu": 8 // ranks,
        "optimizer": {"type": "AdamW2", "params": {"lr": 0.02, "eps": 1e-4, **options}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": f"run{label}"},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    watch = Watch(engine, every=1)
    values: dict[str, float] = {}
    for step in range(2):
        tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step)).chunk(
            ranks
        )[rank]
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        values = dict(watch.step(loss))
    watch.close()
    return values


def accumulated() -> list[int]:
    """How many numbers each of four micro-batches measures, two of which are a step."""
    model = GPT(GPTConfig(norm="pre", vocabulary=50, context=16, layers=1, heads=2, width=24))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW2", "params": {"lr": 0.02}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    watch = Watch(engine, every=1)
    counts = []
    for _ in range(4):
        tokens = torch.randint(50, (2, 17))
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        counts.append(len(watch.step(loss)))
    watch.close()
    return counts


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    cases: dict[str, dict[str, Any]] = {"": {}, "project": {"clip": "project", "vectors": 4}}
    for stage, (suffix, options) in product(sys.argv[2:], cases.items()):
        label = f"{stage}{suffix}"
        values = measured(int(stage), folder, label, **options)
        if dist.get_rank() == 0:
            (folder / f"{label}.json").write_text(json.dumps(values))
    if dist.get_world_size() == 1:
        (folder / "accumulated.json").write_text(json.dumps(accumulated()))
    shutdown()


if __name__ == "__main__":
    main()
