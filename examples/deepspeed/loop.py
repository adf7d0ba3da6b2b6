"""The training loop that both scripts share.

DeepSpeed's engine, resuming, evaluation, progress, checkpoints.
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
    """What is trained, and on what.

    Sample i of `data` depends on i alone, so that a run can resume on any GPUs.
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
    """Train to the end, or until a SIGTERM.

    Where there is a checkpoint under `out`, go on from the newest.
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
        # Dropout, and with numpy mixup: a resumed run draws what the other would have.
        torch.manual_seed(seed)
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
        mean = torch.stack(losses).mean()
        if watch is not None:
            watch.step(mean)
        loss, stops = mean_over_ranks(torch.stack([mean, stop.asked(engine.device)]))
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
    """Save, and only then let `latest` name it.

    A run that is killed meanwhile goes on from the checkpoint before.
    """
    # DeepSpeed itself writes `latest` once rank 0 has saved its own files, others may still be at
    # theirs.
    state = {"step": step}
    engine.save_checkpoint(str(folder), tag=f"step_{step}", client_state=state, save_latest=False)
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
        files_of = ", ".join(map(str, sorted(owners))) or "none"
        problem = (
            f"{folder / tag} takes as many ranks as saved it, whose files are all there, got "
            f"{ranks} ranks and files of {files_of}"
        )
    for path in files[dist.get_rank() :: ranks]:
        problem = problem or _problem_of(path)
    problems: list[str | None] = [None] * ranks
    dist.all_gather_object(problems, problem)
    problem = next(filter(None, problems), None)
    if problem is None:
        return
    others = ", ".join(sorted(path.name for path in folder.glob("step_*") if path.name != tag))
    if others:
        problem += f"; there are {others}, too: write one's name into {folder / 'latest'}"
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
        # Else it is from before zip files, or of "checkpoint_serialization": false, and there are
        # no check sums in it.
        with torch.serialization.safe_globals(RECORDS):
            torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            return f"{path} is damaged"
        takes = f"{path} takes tensors and DeepSpeed's own records"
        return f"{takes}, got {name[1]}, which could run code"
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError):
        return f"{path} is damaged"
    return None


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; gains, biases and what timm's model exempts, its position tables, do not."""
    exempt = getattr(model, "no_weight_decay", set)()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and name not in exempt
            (decayed if decays else others).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def batches(recipe: Recipe, work: Work, step: int) -> Iterator[Batch]:
    """This rank's micro batches from `step` on.

    Which samples a step takes depends on its number alone.
    """
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), recipe.micro_batch_size

    def indices() -> Iterator[list[int]]:
        begin, end = step * recipe.global_batch_size, work.steps * recipe.global_batch_size
        for first in range(begin, end, size * ranks):
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
        has_own = first + rank < len(starts)
        start = starts[first + rank] if has_own else 0
        samples = [work.valid[i] for i in range(start, min(start + size, work.valid_samples))]
        batch = to_device(default_collate(samples), engine)
        for name, mean in work.score(engine, batch).items():
            weight = len(samples) if has_own else 0
            sums[name] = sums.get(name, 0.0) + mean.double() * weight
    means = mean_over_ranks(torch.stack(list(sums.values())))
    engine.train()
    samples = work.valid_samples
    return {name: mean * ranks / samples for name, mean in zip(sums, means, strict=True)}


def to_device(batch: Any, engine: Any) -> Batch:
    """Tokens stay integers; images take the type of the weights."""
    inputs, targets = (part.to(engine.device, non_blocking=True) for part in batch)
    if inputs.is_floating_point():
        inputs = inputs.to(next(engine.module.parameters()).dtype)
    return inputs, targets


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
    """Rank 0's lines on the terminal, and OUT/log.jsonl with every step.

    The other ranks write nothing.
    """

    def __init__(self, recipe: Recipe, work: Work, out: Path, step: int) -> None:
        self.every, self.work, self.batch = recipe.log_interval, work, recipe.global_batch_size
        self.file: TextIO | None = None
        if dist.get_rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            path = out / "log.jsonl"
            # Steps after the checkpoint are made again.
            lines = _lines(path) if step else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(kept), encoding="utf-8")
            self.file = path.open("a", encoding="utf-8")
        # ds_numel is ZeRO-3's.
        sizes = (getattr(weight, "ds_numel", weight.numel()) for weight in work.model.parameters())
        millions = sum(sizes) / 1e6
        accumulated = recipe.global_batch_size // (recipe.micro_batch_size * dist.get_world_size())
        self.line(
            f"{millions:.1f} M parameters, {recipe.optimizer}, {dist.get_world_size()} ranks × "
            f"{accumulated} × {recipe.micro_batch_size} samples, steps {step} to {work.steps}"
        )
        self.start = self.last = time.monotonic()
        self.first = self.last_step = step

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
            scores = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.line(f"step {step}: {scores}")
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
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n")]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _forget(folder: Path, kept: int, step: int) -> None:
    """Delete all checkpoints up to this step but the newest.

    Those of later steps are of a run that was cut off.
    """
    dist.barrier()
    if dist.get_rank() == 0:
        matches = (re.fullmatch(r"step_(\d+)", path.name) for path in folder.iterdir())
        steps = sorted(int(match[1]) for match in matches if match and int(match[1]) <= step)
        for old in steps[:-kept]:
            shutil.rmtree(folder / f"step_{old}")


def start(script: str) -> int:
    """Join the other processes and return how many there are."""
    if "RANK" not in os.environ:
        raise ValueError(
            f"{script} takes RANK and WORLD_SIZE from torchrun or deepspeed, got neither"
        )
    if not torch.cuda.is_available():
        # Compiled for a minute, and no faster.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The engine does so later than `check`.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed(verbose=False)
    return dist.get_world_size()


def fail(script: str, error: Exception) -> int:
    print(f"{script}: error: {error}", file=sys.stderr)
    return 2
