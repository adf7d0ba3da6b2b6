"""The training loop that both scripts share: DeepSpeed's engine, resuming, evaluation, progress,
checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import deepspeed
import numpy
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from examples.deepspeed.heartbeat import Heartbeat
from examples.deepspeed.recipe import Recipe, deepspeed_config
from examples.deepspeed.throughput import peak_flops
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch import Watch

Batch = tuple[Tensor, Tensor]

#: What is in DeepSpeed's checkpoints beside tensors and plain numbers.
RECORDS = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@dataclass(frozen=True)
class Work:
    """What is trained, and on what. Sample i of `data` depends on i alone, so that a run can resume
    on any GPUs.
    """

    model: nn.Module
    data: Dataset  # of pairs (inputs, targets); it takes any index from 0 on
    steps: int
    loss: Callable[[nn.Module, Batch], Tensor]  # the mean over a micro batch
    valid: Dataset
    valid_samples: int
    score: Callable[[nn.Module, Batch], dict[str, Tensor]]  # each the mean over a micro batch
    unit: str  # what a sample's `size` counts: "tokens", "images"
    size: int
    flops: float  # of one sample, forward and backward


def train(recipe: Recipe, work: Work, out: Path, watched: Path | None = None) -> None:
    """Train to the end, or until a SIGTERM; go on from the newest checkpoint under `out` where
    there is one.
    """
    config = deepspeed_config(recipe, work.steps, dist.get_world_size())
    step, checkpoints = 0, out / "checkpoints"
    resumes = (checkpoints / "latest").is_file()
    if resumes:
        check(checkpoints, config["zero_optimization"]["stage"])
    engine, *_ = deepspeed.initialize(
        model=work.model, model_parameters=groups(work.model), config=config
    )
    if resumes:
        _, saved = engine.load_checkpoint(str(checkpoints))
        step = saved["step"]
    watch = None
    if watched is not None:
        watch = Watch(engine, every=recipe.watch_interval, out=watched, steps_done=step)
    log = Log(recipe, work, out, step)
    stop = Stop()
    heartbeat = Heartbeat(recipe.hang_after, step)
    micro_batches = batches(recipe, work, step)
    engine.train()
    while step < work.steps:
        seed = hash((recipe.seed, step, dist.get_rank())) % 2**32
        torch.manual_seed(
            seed
        )  # dropout, and with numpy mixup: a resumed run draws what the other would have
        numpy.random.seed(seed)
        losses = []
        for _ in range(engine.gradient_accumulation_steps()):
            loss = work.loss(engine, to_device(next(micro_batches), engine))
            engine.backward(loss)
            lr = engine.optimizer.param_groups[0]["lr"]
            engine.step()
            losses.append(loss.detach().float())
        step += 1
        heartbeat.at(step)
        if watch is not None:
            watch.step(torch.stack(losses).mean())
        loss, stops = mean_over_ranks(
            torch.stack([torch.stack(losses).mean(), stop.asked(engine.device)])
        )
        log.step(step, loss, lr)
        ends = step == work.steps or stops > 0
        if ends or (recipe.eval_interval and step % recipe.eval_interval == 0):
            log.evaluation(step, evaluate(engine, recipe, work))
        if ends or (recipe.save_interval and step % recipe.save_interval == 0):
            save(engine, checkpoints, step)
            _forget(checkpoints, recipe.keep_checkpoints, step)
        if stops > 0:
            log.line(f"step {step}: saved after a SIGTERM; the same command goes on from here")
            break
    heartbeat.close()
    log.close()


def save(engine: Any, folder: Path, step: int) -> None:
    """Save, and only then let `latest` name it: a run that is killed meanwhile goes on from the one
    before.
    """
    # DeepSpeed itself writes `latest` once rank 0 has saved its own files, others may still be at
    # theirs.
    engine.save_checkpoint(
        str(folder), tag=f"step_{step}", client_state={"step": step}, save_latest=False
    )
    if dist.get_rank() == 0:  # that ended in a barrier
        (folder / "latest.new").write_text(f"step_{step}", encoding="utf-8")
        (folder / "latest.new").replace(folder / "latest")


def check(folder: Path, stage: int) -> None:
    """End all ranks with one sentence if the newest checkpoint is not whole, or would run code.

    torch loads changed numbers unseen, and DeepSpeed loads whatever a pickle can hold.
    """
    tag, ranks = (folder / "latest").read_text(encoding="utf-8").strip(), dist.get_world_size()
    files = sorted((folder / tag).glob("*.pt"))
    matches = (re.search(r"zero_pp_rank_(\d+)_.*optim_states", path.name) for path in files)
    owners = {int(match[1]) for match in matches if match}
    problem = None
    if stage and owners != set(range(ranks)):
        problem = (
            f"{folder / tag} takes as many ranks as saved it, whose files are all there, got "
            f"{ranks} ranks and "
        )
        problem += f"files of {', '.join(map(str, sorted(owners))) or 'none'}"
    for path in files[dist.get_rank() :: ranks]:
        problem = problem or _problem_of(path)
    problems: list[str | None] = [None] * ranks
    dist.all_gather_object(problems, problem)
    problem = next(filter(None, problems), None)
    if problem is None:
        return
    others = sorted(path.name for path in folder.glob("step_*") if path.name != tag)
    problem += (
        f"; there are {', '.join(others)}, too: write one's name into {folder / 'latest'}"
        if others
        else ""
    )
    if dist.get_rank() == 0:
        fail(Path(sys.argv[0]).name, ValueError(problem))
    shutdown(2)


def _problem_of(path: Path) -> str | None:
    """Return what is wrong with a file of a checkpoint, which must not be loaded then."""
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path} is damaged"
        # Else it is of before zip files, or of "checkpoint_serialization": false; there are no
        # check sums in it.
        with torch.serialization.safe_globals(RECORDS):
            torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is not None:
            return (
                f"{path} takes tensors and DeepSpeed's own records, got {name[1]}, which could "
                "run code"
            )
        return f"{path} is damaged"
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError):
        return f"{path} is damaged"
    return None


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; gains, biases and what timm's model exempts, its position tables, do not."""
    exempt = getattr(model, "no_weight_decay", set)()
    named = [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    return [
        {"params": [one for name, one in named if one.ndim >= 2 and name not in exempt]},
        {
            "params": [one for name, one in named if one.ndim < 2 or name in exempt],
            "weight_decay": 0.0,
        },
    ]


def batches(recipe: Recipe, work: Work, step: int) -> Iterator[Batch]:
    """This rank's micro batches from `step` on: which samples a step takes depends on its number
    alone.
    """
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), recipe.micro_batch_size

    def indices() -> Iterator[list[int]]:
        for first in range(
            step * recipe.global_batch_size, work.steps * recipe.global_batch_size, size * ranks
        ):
            yield list(range(first + rank * size, first + (rank + 1) * size))

    loader = DataLoader(
        work.data,
        batch_sampler=indices(),
        num_workers=recipe.dataloader_workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


@torch.no_grad()
def evaluate(engine: Any, recipe: Recipe, work: Work) -> dict[str, float]:
    """Return the mean of each score over the held-out samples, equal on every rank."""
    engine.eval()
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), recipe.micro_batch_size
    starts = range(0, work.valid_samples, size)
    sums: dict[str, Tensor] = {}
    for first in range(0, len(starts), ranks):
        # Under ZeRO-3 a forward pass is collective: a rank without samples of its own repeats some
        # that do not count.
        start = starts[first + rank] if first + rank < len(starts) else None
        samples = [
            work.valid[i] for i in range(start or 0, min((start or 0) + size, work.valid_samples))
        ]
        batch = to_device(default_collate(samples), engine)
        for name, mean in work.score(engine, batch).items():
            weight = 0 if start is None else len(samples)
            sums[name] = sums.get(name, 0.0) + mean.double() * weight
    totals = mean_over_ranks(torch.stack(list(sums.values())))
    engine.train()
    return {
        name: total * ranks / work.valid_samples for name, total in zip(sums, totals, strict=True)
    }


def to_device(batch: Any, engine: Any) -> Batch:
    """Tokens stay integers; images take the type of the weights."""
    inputs, targets = (part.to(engine.device, non_blocking=True) for part in batch)
    return (
        inputs.to(next(engine.module.parameters()).dtype) if inputs.is_floating_point() else inputs
    ), targets


def mean_over_ranks(values: Tensor) -> list[float]:
    """The mean of each value over all ranks."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


class Stop:
    """Whether this rank was asked to end: SLURM and torchrun send a SIGTERM before they kill."""

    def __init__(self) -> None:
        self.was_asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def asked(self, device: torch.device) -> Tensor:
        return torch.tensor(float(self.was_asked), device=device)

    def _ask(self, *_: object) -> None:
        self.was_asked = True


class Log:
    """Rank 0's lines on the terminal, and OUT/log.jsonl with every step; the other ranks write
    nothing.
    """

    def __init__(self, recipe: Recipe, work: Work, out: Path, step: int) -> None:
        self.every, self.work, self.batch = recipe.log_interval, work, recipe.global_batch_size
        self.file: TextIO | None = None
        if dist.get_rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            path = out / "log.jsonl"
            kept = (
                [line for line in _lines(path) if json.loads(line)["step"] <= step] if step else []
            )
            path.write_text(
                "".join(kept), encoding="utf-8"
            )  # steps after the checkpoint are made again
            self.file = path.open("a", encoding="utf-8")
        millions = (
            sum(getattr(one, "ds_numel", one.numel()) for one in work.model.parameters()) / 1e6
        )  # ds_: ZeRO-3's
        accumulated = recipe.global_batch_size // (recipe.micro_batch_size * dist.get_world_size())
        self.line(
            f"{millions:.1f} M parameters, {recipe.optimizer}, {dist.get_world_size()} ranks × "
            f"{accumulated} × {recipe.micro_batch_size} samples, steps {step} to {work.steps}"
        )
        self.start, self.first, self.last, self.last_step = (
            time.monotonic(),
            step,
            time.monotonic(),
            step,
        )

    def step(self, step: int, loss: float, lr: float) -> None:
        if self.file is None:
            return
        now = time.monotonic()
        self._write({"step": step, "loss": loss, "lr": lr, "seconds": round(now - self.start, 3)})
        if step % self.every and step not in (self.first + 1, self.work.steps):
            return
        rate = (step - self.last_step) * self.batch / (now - self.last)
        line = f"step {step}/{self.work.steps}: loss {loss:.4f}, lr {lr:.2e}, "
        line += f"{rate * self.work.size:,.0f} {self.work.unit}/s"
        peak = peak_flops()
        if peak is not None:
            line += f", MFU {rate * self.work.flops / (peak * dist.get_world_size()):.1%}"
        left = (self.work.steps - step) * (now - self.start) / (step - self.first)
        self.line(f"{line}, {_duration(left)} left")
        self.last, self.last_step = now, step

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        if self.file is not None:
            self._write({"step": step, **values})
            self.line(
                f"step {step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            )
        self.last = time.monotonic()

    def line(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _write(self, record: dict[str, float]) -> None:
        assert self.file is not None
        numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.file.write(json.dumps(numbers) + "\n")
        self.file.flush()


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; a run that was killed may have left half of one."""
    if not path.is_file():
        return []
    return [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("}\n")
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _forget(folder: Path, kept: int, step: int) -> None:
    """Delete all checkpoints up to this step but the newest. Those of later steps are of a run that
    was cut off.
    """
    dist.barrier()
    if dist.get_rank() == 0:
        steps = sorted(
            int(match[1])
            for path in folder.iterdir()
            if (match := re.fullmatch(r"step_(\d+)", path.name))
        )
        for old in [one for one in steps if one <= step][:-kept]:
            shutil.rmtree(folder / f"step_{old}")


def start(script: str) -> int:
    """Join the other processes and return how many there are."""
    if "RANK" not in os.environ:
        raise ValueError(
            f"{script} takes RANK and WORLD_SIZE from torchrun or deepspeed, got neither"
        )
    if not torch.cuda.is_available():
        # compiled for a minute, and no faster
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(
        int(os.environ.get("LOCAL_RANK", 0))
    )  # the engine does so later than `check`
    deepspeed.init_distributed(verbose=False)
    return dist.get_world_size()


def fail(script: str, error: Exception) -> int:
    print(f"{script}: error: {error}", file=sys.stderr)
    return 2
