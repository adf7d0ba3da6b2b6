"""torchrun worker: watches two steps of examples/collapse's GPT under DeepSpeed; writes the second measurement.

Usage: zero_worker.py STAGE OUT.json. The global batch is the same at any number of processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.stability.watch import Watch


def main() -> None:
    stage, out = int(sys.argv[1]), Path(sys.argv[2])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    model = GPT(GPTConfig(norm="pre", vocabulary=50, context=16, layers=3, heads=2, width=24))
    named = list(model.named_parameters())
    config = {
        "train_micro_batch_size_per_gpu": 8 // ranks,
        "optimizer": {"type": "AdamW2", "params": {"lr": 0.02, "eps": 1e-4}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "csv_monitor": {"enabled": True, "output_path": str(out.with_suffix("")), "job_name": "run"},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=[p for _, p in named], config=config)
    watch = Watch(engine, every=1)
    values = {}
    for step in range(2):
        tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        values = dict(watch.step(loss))
    watch.close()
    if rank == 0:
        out.write_text(json.dumps(values))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
