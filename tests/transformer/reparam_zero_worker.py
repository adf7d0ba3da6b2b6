"""torchrun worker: trains examples/collapse's GPT with σReparam under DeepSpeed, saves in the
middle, resumes.

Usage: reparam_zero_worker.py OUT_DIR STAGE… The global batch is the same at any number of
processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.transformer.reparam import fold, sigma_reparam, sigmas

STEPS, SAVED = 6, 3


def make(stage: int) -> Any:
    torch.manual_seed(3)
    model = GPT(GPTConfig(norm="pre", vocabulary=50, context=16, layers=2, heads=2, width=24))
    sigma_reparam(model, exclude=("head",))
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "eps": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )[0]


def train(engine: Any, steps: range, folder: Path | None = None) -> list[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in steps:
        tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step)).chunk(
            ranks
        )[rank]
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
        if folder is not None and step == SAVED - 1:
            engine.save_checkpoint(str(folder))
    return losses


def tracked(engine: Any) -> dict[str, float]:
    """σ₁ of every layer from whole parameters."""
    originals = [p for name, p in engine.module.named_parameters() if name.endswith(".original")]
    with deepspeed.zero.GatheredParameters(originals, enabled=hasattr(originals[0], "ds_id")):
        return sigmas(engine.module)


def refusals(engine: Any) -> list[str]:
    """What is said of a model that ZeRO-3 has partitioned, and of one that is made so."""
    with deepspeed.zero.Init(config_dict_or_path=engine.config):
        plain = torch.nn.Linear(8, 8)
    said = []
    for act, model in (
        (fold, engine.module),
        (sigmas, engine.module),
        (sigma_reparam, torch.nn.Sequential(plain)),
    ):
        try:
            act(model)
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in map(int, sys.argv[2:]):
        saved = folder / f"checkpoint{stage}"
        engine = make(stage)
        losses = train(engine, range(STEPS), saved)
        found = {"losses": losses, "sigmas": tracked(engine)}
        other = make(stage)
        other.load_checkpoint(str(saved))
        found["resumed"] = train(other, range(SAVED, STEPS))
        if stage == 3:
            found["refusals"] = refusals(engine)
        if dist.get_rank() == 0:
            (folder / f"{stage}.json").write_text(json.dumps(found))
        del engine, other
    shutdown()


if __name__ == "__main__":
    main()
