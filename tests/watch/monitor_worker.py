"""torchrun worker, 1 rank: a DeepSpeed run whose JSON has W&B and Comet, both offline, in which
attention becomes sparse between two measurements.

Usage: monitor_worker.py OUT_DIR
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])
os.chdir(folder)
os.environ |= {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
    "COMET_DISABLE_AUTO_LOGGING": "1",
}

import comet_ml  # noqa: E402
import deepspeed  # noqa: E402
import torch  # noqa: E402
import wandb  # noqa: E402

from tests.watch.plain_adamw import separate  # noqa: E402
from weyl_megatron.engines.shutdown import shutdown  # noqa: E402
from weyl_megatron.watch.watch import Watch  # noqa: E402


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = separate()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW2", "params": {"lr": 1e-3}},
        "wandb": {"enabled": True, "project": "runs"},
        "comet": {"enabled": True, "project": "runs", "online": False},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config
    )
    watch = Watch(engine, every=1)
    for step in range(2):
        tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step))
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        watch.step(loss)
        with torch.no_grad():
            model.blocks[0].attn.q.weight.mul_(1000)
    watch.close()
    comet_ml.get_running_experiment().end()
    wandb.finish()
    shutdown()


if __name__ == "__main__":
    main()
