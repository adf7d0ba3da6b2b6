"""The worker that torchrun starts on every rank: trains the runs one after another and logs them.

`train` is what a user's own script would hold. It never names the optimizer, which DeepSpeed finds
by the name in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from ..engines.shutdown import shutdown
from . import data
from .model import GPT, GPTConfig
from .recipe import RUNS, Run, deepspeed_config, schedule, sequences_per_rank
from .setting import machine_facts, model_facts, text_facts, training_facts

VALIDATION_WINDOWS = 512
VALIDATION_CHUNK = 32
ENTROPY_WINDOWS = 8
SNAPSHOTS = 80  # points of the α and entropy curves


@dataclass(frozen=True)
class Batches:
    """What every run sees: this rank's part of each step's batch, and the validation sequences."""

    train: Tensor
    offsets: Tensor
    validation: tuple[Tensor, Tensor]
    context: int
    device: torch.device

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = data.sequences(self.train, self.offsets[step], self.context)
        return inputs.to(self.device), targets.to(self.device)


def train(run: Run, steps: int, seed: int, batches: Batches, log: Log) -> None:
    """Trains one run from the seed's weights on the seed's batches."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig())
    config = deepspeed_config(run, dist.get_world_size(), bf16=torch.cuda.is_available())
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        lr_scheduler=schedule(run, steps),
    )

    log.start(run, steps, config)
    for step in range(steps):
        (lr,) = engine.get_lr()
        loss = engine(*batches[step])
        engine.backward(loss)
        engine.step()
        log.step(engine, step + 1, mean_over_ranks(loss), lr, batches)
    log.end(validation_loss(engine, batches))
    engine.destroy()


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar over all ranks."""
    total = value.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@torch.no_grad()
def validation_loss(engine: Any, batches: Batches) -> float:
    """The mean loss on the validation sequences, each rank doing its share of the chunks."""
    inputs, targets = (torch.split(part, VALIDATION_CHUNK) for part in batches.validation)
    chunks = range(dist.get_rank(), len(inputs), dist.get_world_size())
    losses = [engine.module(inputs[chunk], targets[chunk]).float() for chunk in chunks]
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=batches.device)
    return mean_over_ranks(total) * dist.get_world_size() / len(inputs)


class Log:
    """Rank 0's `log.jsonl` of each run, one JSON object per line; the other ranks write nothing."""

    def __init__(self, out: Path) -> None:
        self.out = out if dist.get_rank() == 0 else None
        self.file: TextIO | None = None
        self.began = 0.0
        self.every = 1

    def start(self, run: Run, steps: int, config: dict[str, Any]) -> None:
        """Opens the run's file and writes down its configuration."""
        self.began = time.monotonic()
        self.every = max(1, steps // SNAPSHOTS)
        if self.out is not None:
            (self.out / run.name).mkdir(parents=True, exist_ok=True)
            self.file = (self.out / run.name / "log.jsonl").open("w", encoding="utf-8")
            facts = {"run": run.name, "title": run.title, "steps": steps, "config": config}
            self._write("start", facts)

    def step(self, engine: Any, step: int, loss: float, lr: float, batches: Batches) -> None:
        """Writes a step: loss, scheduled rate, clipped matrices, now and then the details."""
        if self.file is None:
            return
        stats = matrix_stats(engine)
        record: dict[str, Any] = {"step": step, "loss": loss, "lr": lr}
        if stats:
            record["clipped"] = sum(matrix.clipped for matrix in stats.values())
            record["matrices"] = len(stats)
        if step == 1 or step % self.every == 0:
            record["alpha"] = {name: float(f"{matrix.lr:.5g}") for name, matrix in stats.items()}
            record |= projected(stats)
            tokens = batches.validation[0][:: VALIDATION_WINDOWS // ENTROPY_WINDOWS]
            entropy = engine.module.attention_entropy(tokens)
            record["entropy"] = [[round(head, 5) for head in layer] for layer in entropy.tolist()]
        self._write("step", record)

    def end(self, loss: float) -> None:
        """Writes the final validation loss and closes the file."""
        if self.file is not None:
            self._write("end", {"validation_loss": loss})
            self.file.close()
            self.file = None

    def _write(self, event: str, record: dict[str, Any]) -> None:
        assert self.file is not None
        elapsed = round(time.monotonic() - self.began, 3)
        self.file.write(json.dumps({"event": event, **record, "elapsed": elapsed}) + "\n")
        self.file.flush()


def matrix_stats(engine: Any) -> Mapping[str, Any]:
    """What the last step did to each matrix; nothing where the optimizer does not say."""
    stats: Mapping[str, Any] = getattr(engine.basic_optimizer, "stats", dict)()
    return stats


def projected(stats: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of the matrices that are projected: how many singular values of the update were clipped, and
    what was left of it and of what the vectors do not see; nothing where none are.
    """
    matrices = {name: each for name, each in stats.items() if each.directions is not None}
    if not matrices:
        return {}
    return {
        "directions": {name: each.directions for name, each in matrices.items()},
        "share": {name: float(f"{each.share:.5g}") for name, each in matrices.items()},
        "unseen": {name: float(f"{each.unseen:.5g}") for name, each in matrices.items()},
    }


def load_batches(corpus: data.Corpus, steps: int, seed: int, device: torch.device) -> Batches:
    """This rank's batches and the validation sequences."""
    rank, ranks, context = dist.get_rank(), dist.get_world_size(), GPTConfig().context
    offsets = data.training_offsets(corpus, steps, sequences_per_rank(ranks) * ranks, context, seed)
    windows = data.validation_offsets(corpus, VALIDATION_WINDOWS, context)
    inputs, targets = data.sequences(corpus.validation, windows, context)
    return Batches(
        corpus.train,
        offsets[:, rank::ranks],
        (inputs.to(device), targets.to(device)),
        context,
        device,
    )


def describe(corpus: data.Corpus, batches: Batches, steps: int, seed: int) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        **training_facts(steps, seed, dist.get_world_size(), batches.device),
        **model_facts(GPT(GPTConfig())),
        "text": text_facts(corpus, batches.validation[1].cpu()),
        "machine": machine_facts(),
    }


def forgo_compiled_collectives() -> None:
    """Keeps DeepSpeed to gloo between CPU processes.

    Its shared-memory collectives need a C++ compiler and up to a minute at first use, and wait by
    spinning, which costs more than it gains where processes share cores.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Trains all runs; `launch` starts this under torchrun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()

    forgo_compiled_collectives()
    deepspeed.init_distributed(verbose=False)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    corpus = data.load_corpus()
    batches = load_batches(corpus, arguments.steps, arguments.seed, device)
    if dist.get_rank() == 0:
        setting = json.dumps(describe(corpus, batches, arguments.steps, arguments.seed))
        (arguments.out / "setting.json").write_text(setting, encoding="utf-8")
    log = Log(arguments.out)
    for run in RUNS:
        train(run, arguments.steps, arguments.seed, batches, log)


if __name__ == "__main__":
    main()
    shutdown()
