"""torchrun worker of soak.py: some steps of a run under ZeRO-3, on any of 1, 2, 3 or 6 ranks.

Usage: soak_worker.py OUT LAST TOTAL LOAD: trains up to step LAST of TOTAL, from the newest
checkpoint ("rigid"), from its universal copy ("universal") or from nothing ("none"). Appends to
OUT/log.jsonl. Imports nothing to train with AdamW2: DeepSpeed finds it by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.demo import data
from weyl_megatron.engines.shutdown import shutdown

BATCH, CONTEXT, SAVED_EVERY, HASHED_EVERY = 6, 32, 50, 100


def config_of(total: int, is_universal: bool) -> dict[str, Any]:
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 20_000,
            "stage3_param_persistence_threshold": 200,
        },
        "optimizer": {
            "type": "AdamW2",
            "params": {"lr": 3e-3, "betas": [0.9, 0.95], "tau": 0.01, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": total,
                "warmup_num_steps": 1,
                "warmup_min_ratio": 1.0,
                "cos_min_ratio": 0.1,
            },
        },
        "checkpoint": {"load_universal": is_universal},
        "steps_per_print": 1_000_000,
    }


def digest(engine: Any) -> str:
    """Of all whole weights, and of what the optimizer takes from one step to the next, on this
    rank.
    """
    found = hashlib.sha256()
    for parameter in engine.module.parameters():
        found.update(safe_get_full_fp32_param(parameter).numpy().tobytes())
        if parameter.numel():  # small ones lie whole on every rank
            found.update(parameter.detach().float().numpy().tobytes())
    for stat in sorted(engine.basic_optimizer.stats().items()):
        found.update(repr(stat).encode())
    return found.hexdigest()


def main() -> None:
    out, last, total, load = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=10), verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    corpus = data.load_corpus()
    offsets = data.training_offsets(corpus, total, BATCH, CONTEXT, 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(norm="pre", layers=2, context=CONTEXT, width=48))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config_of(total, load == "universal"),
    )
    step, checkpoints = 0, out / "checkpoints"
    if load != "none":
        tag = (checkpoints / "latest").read_text()
        engine.load_checkpoint(
            str(checkpoints), tag=f"{tag}-universal" if load == "universal" else tag
        )
        step = int(tag.removeprefix("step"))
    log = (out / "log.jsonl").open("a") if rank == 0 else None
    while step < last:
        inputs, targets = data.sequences(corpus.train, offsets[step, rank::ranks], CONTEXT)
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        step += 1
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        record: dict[str, Any] = {"step": step, "loss": mean.item() / ranks, "ranks": ranks}
        if step % HASHED_EVERY == 0:
            digests: list[Any] = [None] * ranks
            dist.all_gather_object(digests, digest(engine))
            record |= {"agree": len(set(digests)) == 1, "mib": resident(), "process": os.getpid()}
        if log is not None:
            log.write(json.dumps(record) + "\n")
            log.flush()
        if step % SAVED_EVERY == 0 or step == last:
            engine.save_checkpoint(str(checkpoints), tag=f"step{step}")
    shutdown()


def resident() -> float:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
