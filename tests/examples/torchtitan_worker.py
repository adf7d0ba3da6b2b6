"""torchrun worker: torchtitan's own trainer with examples/torchtitan, on CPU and gloo.

    torchrun --nproc_per_node=N tests/examples/torchtitan_worker.py FOLDER STEP

torchtitan takes a CUDA device for granted, FlexAttention that is compiled, and a tokenizer from a
hub; what stands in their places is here. The rest is torchtitan's: FSDP2, pipelines, clipping,
schedules, checkpoints.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as device_of_torchtitan
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.processes import ROOT
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

sys.path.insert(0, str(ROOT / "examples" / "torchtitan"))

STEPS, SAVED, LENGTH, BATCH, VOCABULARY = 6, 3, 16, 4, 2048


class Cpu(types.ModuleType):
    """What torchtitan asks torch.cuda, answered for the CPU."""

    def __getattr__(self, name: str) -> Any:
        if name == "get_device_properties":
            return lambda device: types.SimpleNamespace(total_memory=2**34)
        if name in ("memory_stats", "get_device_name"):
            return lambda device: {} if name == "memory_stats" else "CPU"
        if name in ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache"):
            return lambda *_: None
        if name in ("current_device", "device_count"):
            return lambda: 0 if name == "current_device" else 1
        return getattr(torch.cpu, name)


device_of_torchtitan.device_type, device_of_torchtitan.device_module = "cpu", Cpu("cpu")
device_of_torchtitan.get_local_device = lambda: torch.device("cpu")

import adamw2  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402


class Letters(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode()

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Drawn(BaseDataLoader):
    """Batches that depend on the step alone; data-parallel ranks share them out."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any
    ) -> None:
        self.place = dp_rank, dp_world_size
        self.rows, self.number = local_batch_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rank, ranks = self.place
        while True:
            generator = torch.Generator().manual_seed(self.number)
            size = self.rows * ranks, LENGTH + 1
            tokens = torch.randint(0, VOCABULARY, size, generator=generator).chunk(ranks)[rank]
            self.number += 1
            yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict.get("number", 0)


def config_of(folder: Path, load_step: int) -> Trainer.Config:
    config = adamw2.llama3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.optimizer = adamw2.adamw2(lr=1e-2, tau="balanced")  # a rate that is clipped
    config.lr_scheduler.min_lr_factor = 1.0
    config.tokenizer, config.dataloader = Letters.Config(), Drawn.Config()
    training = config.training
    training.local_batch_size = BATCH // int(os.environ["WORLD_SIZE"])
    training.seq_len, training.steps = LENGTH, STEPS
    training.disable_cuda_graphs, training.mixed_precision_param = True, "float32"
    config.validator.enable, config.debug.seed, config.dump_folder = False, 7, str(folder)
    config.checkpoint.enable, config.checkpoint.interval = True, SAVED
    config.checkpoint.load_step = load_step
    config.checkpoint.keep_latest_k = 0
    return config


def train(folder: Path, *, load_step: int) -> Trainer:
    trainer = config_of(folder, load_step).build()
    for part in trainer.model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):  # gloo cannot multiply before it adds up
                module.set_force_sum_reduction_for_comms(True)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for part in trainer.model_parts
        for name, param in part.named_parameters()
    }


def main() -> None:
    folder, load_step = Path(sys.argv[1]), int(sys.argv[2])
    trainer = train(folder, load_step=load_step)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, AdamW2)
    entries, ended = optimizer.stats(), weights(trainer)
    assert "layers.0.feed_forward.w1.weight" in entries, list(entries)
    clipped = sum(entry.clipped for entry in entries.values())
    assert clipped > 0
    if dist.get_rank() == 0:
        print(f"{len(entries)} matrices, {clipped} clipped in step {trainer.step}", flush=True)
        if load_step < 0:
            torch.save(ended, folder / "weights.pt")
        else:
            expected = torch.load(folder / "weights.pt")
            far = max(float((ended[name] - each).abs().max()) for name, each in expected.items())
            print(f"resumed at step {load_step}: {far} from a run without a break", flush=True)
            assert far == 0
    trainer.close()
    dist.barrier()
    print("done", flush=True)


if __name__ == "__main__":
    main()
    shutdown()
