"""torchrun worker: a module that Lightning spreads by its ModelParallelStrategy (FSDP2) trains as
one process trains it, and goes on from checkpoints bit for bit.

    torchrun --nproc_per_node=2 tests/engines/torch/lightning_worker.py OUT_DIR

What Lightning is given is written as docs/fsdp2_accelerate.md writes it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader

from tests import tolerances
from tests.engines.torch.mesh_worker import ROWS, STEPS, TOLERANCE, batch
from tests.engines.torch.meshes import Net, whole
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown


def loss_of(net: Net, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten())


def make(net: Net) -> AdamW2:
    return AdamW2(net.named_parameters(), lr=1e-2, weight_decay=0.1, tau=0.03)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> AdamW2:
        return make(self.model)

    def training_step(self, _: Any) -> Tensor:
        world = dist.get_world_size()
        return loss_of(self.model, batch(self.global_step, ROWS * world).chunk(world)[self.rank])

    @property
    def rank(self) -> int:
        return dist.get_rank()


def fit(out: Path, steps: int, *, is_full: bool, resumes: bool) -> tuple[Any, AdamW2]:
    """Return the trained module and its optimizer; save both at the end, or go on from there."""
    strategy = ModelParallelStrategy(
        data_parallel_size=dist.get_world_size() if dist.is_initialized() else 2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=not is_full,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=steps,
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    saved = out / f"full-{is_full}"
    trainer.fit(module, DataLoader(range(10 * STEPS)), ckpt_path=str(saved) if resumes else None)
    if not resumes:
        trainer.save_checkpoint(saved)
    optimizer: Any = trainer.optimizers[0]
    return module, optimizer


def main() -> None:
    warnings.simplefilter("ignore")
    tolerances.make_every_iteration()
    out = Path(sys.argv[1])
    torch.manual_seed(0)
    alone = Net()
    expected = make(alone)
    for is_full in (False, True):
        module, optimizer = fit(out, STEPS, is_full=is_full, resumes=False)
        if not is_full:
            for step in range(STEPS):
                expected.zero_grad()
                loss_of(alone, batch(step, ROWS * dist.get_world_size())).backward()
                expected.step()
        weights = [whole(param) for param in module.model.parameters()]
        distance = max(
            float((weight - param).norm() / param.norm())
            for weight, param in zip(weights, alone.parameters(), strict=True)
        )
        assert set(optimizer.stats()) == set(expected.stats())
        fit(out, STEPS // 2, is_full=is_full, resumes=False)
        again, resumed = fit(out, STEPS, is_full=is_full, resumes=True)
        gone_on = [whole(param) for param in again.model.parameters()]
        differ = sum(not torch.equal(a, b) for a, b in zip(weights, gone_on, strict=True))
        if dist.get_rank() == 0:
            print(
                f"{'full' if is_full else 'sharded'}: {distance:.1e} from one process; resumed: "
                f"{differ} of {len(weights)} differ",
                flush=True,
            )
        assert distance <= TOLERANCE
        assert not differ and resumed.stats() == optimizer.stats()
    print("all agree", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
