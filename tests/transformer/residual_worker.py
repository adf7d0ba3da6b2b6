"""torchrun worker: three steps of a small GPT with scaled residuals under DeepSpeed; writes losses
and parameters.

Usage: residual_worker.py OUT_DIR STAGE…
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.transformer.residual import scale_residuals

CONFIG = GPTConfig(norm="pre", vocabulary=50, context=16, layers=3, heads=2, width=24)
OPTIMIZER = {"lr": 0.02, "eps": 1e-4}
STEPS = 3


def tokens(step: int) -> Tensor:
    """The global batch of a step (8, 17)."""
    return torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))


def scaled_model(mode: str) -> GPT:
    torch.manual_seed(3)
    model = GPT(CONFIG)
    scale_residuals(model, mode=mode)
    return model


def trained(mode: str, stage: int) -> dict[str, Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = scaled_model(mode)
    config = {
        "train_micro_batch_size_per_gpu": 8 // ranks,
        "optimizer": {"type": "AdamW2", "params": OPTIMIZER},
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    losses = []
    for step in range(STEPS):
        mine = tokens(step).chunk(ranks)[rank]
        loss = engine(mine[:, :-1], mine[:, 1:])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total / ranks)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        state = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    engine.destroy()
    return state | {"losses": torch.stack(losses)}


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in sys.argv[2:]:
        for mode in ("forward", "learned"):
            state = trained(mode, int(stage))
            if dist.get_rank() == 0:
                torch.save(state, folder / f"{mode}{stage}.pt")
    shutdown()


if __name__ == "__main__":
    main()
