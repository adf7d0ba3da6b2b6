"""GPT-2 124M, trained on text that lies on the machine, as long as there is time (`train`)."""

from __future__ import annotations

import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu.part import Failed, Task, result
from benchmarks.gpu.plot import Curve, draw
from benchmarks.gpu.text import Text, read_text
from examples.deepspeed.gpt import GPT
from examples.deepspeed.recipe import GPTRecipe
from weyl_megatron import AdamW2

#: nanoGPT's for this model; the batch is what a GPU of 80 GB holds without recomputing.
_LR, _LEAST_LR, _BETAS, _DECAY, _BATCH = 6e-4, 0.1, (0.9, 0.95), 0.1, 32
_WARMUP = 0.1  # of the steps
_TURN = 10  # steps that a run makes in its turn, after which it is logged
_PROBES = 6  # steps that are timed before, of which the first third warms up

#: Seconds for the losses on what is held out, and for the plots.
_ENDING = 15.0


class Way(NamedTuple):
    """One of the ways to train."""

    title: str
    color: str
    optimizers: Callable[[nn.Module], list[Optimizer]]
    warms_up: bool = False


class Run:
    """A model on its way."""

    def __init__(self, task: Task, way: Way, recipe: GPTRecipe) -> None:
        torch.manual_seed(0)  # the same start for all
        self.way, self.curve = way, Curve(way.title, way.color)
        self.model = GPT(recipe).to(task.device)
        self.optimizers = way.optimizers(self.model)
        self.rates = [group["lr"] for each in self.optimizers for group in each.param_groups]
        self.seconds = 0.0

    def step(self, inputs: Tensor, targets: Tensor, share: float) -> Tensor:
        """Make a step at ``share`` of the schedule; return the loss."""
        factor = schedule(share, _WARMUP if self.way.warms_up else 0.0)
        groups = (group for each in self.optimizers for group in each.param_groups)
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(inputs.device.type, torch.bfloat16):
            loss: Tensor = self.model(inputs, targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def clipped(self) -> float | None:
        """Return the share of matrices that the last step clipped; None of other optimizers."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, AdamW2):
                entries = optimizer.stats().values()
                return sum(entry.clipped for entry in entries) / len(entries)
        return None


def schedule(share: float, warmup: float) -> float:
    """Return the rate at a share of the steps, as a share of the largest: a cosine to a tenth,
    after a warmup.
    """
    cosine = _LEAST_LR + (1 - _LEAST_LR) * 0.5 * (1 + math.cos(math.pi * share))
    return cosine * (min(1.0, share / warmup) if warmup else 1.0)


def ways(task: Task) -> list[Way]:
    """Return the ways to train that there are here."""
    listed = [
        Way("AdamW", "#c8452d", lambda model: [_adamw(task, _groups(model))]),
        Way("AdamW, warmup", "#6b7280", lambda model: [_adamw(task, _groups(model))], True),
        Way("AdamW², scaled", "#0f8a78", lambda model: [_adamw2(model, {})]),
    ]
    if "clip" in inspect.signature(AdamW2).parameters:
        listed.append(
            Way(
                "AdamW², projected",
                "#5b4bd6",
                lambda model: [_adamw2(model, {"clip": "project", "model": model})],
            )
        )
    else:
        result("train", way="AdamW², projected", status='not run: AdamW2 has no clip="project"')
    if hasattr(torch.optim, "Muon"):
        listed.append(Way("Muon", "#22a559", lambda model: _muon(task, model)))
    else:
        result("train", way="Muon", status=f"not run: torch {torch.__version__} has none")
    return listed


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [each for each in named if each[1].ndim > 1], "weight_decay": _DECAY},
        {"params": [each for each in named if each[1].ndim < 2], "weight_decay": 0.0},
    ]


def _adamw(task: Task, groups: Sequence[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, lr=_LR, betas=_BETAS, fused=task.is_gpu)


def _adamw2(model: nn.Module, options: Mapping[str, Any]) -> Optimizer:
    return AdamW2(_groups(model), lr=_LR, betas=_BETAS, tau=0.01, **options)


def _muon(task: Task, model: nn.Module) -> list[Optimizer]:
    """Muon on the hidden matrices at the same rate, AdamW on the rest."""
    matrices, vectors = _groups(model)
    hidden = [each for each in matrices["params"] if each[0].startswith("h.")]
    others = [each for each in matrices["params"] if not each[0].startswith("h.")]
    muon = torch.optim.Muon(hidden, lr=_LR, weight_decay=_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw(task, [{**matrices, "params": others}, vectors])]


def train(task: Task) -> None:
    """All ways on the same data for the same steps, in turns: whenever it is stopped, they have
    come equally far.
    """
    start = time.perf_counter()
    text = read_text(task)
    seconds = round(time.perf_counter() - start, 1)
    lengths = {"train": len(text.train), "valid": len(text.valid), "vocabulary": text.vocabulary}
    result("text", tokens=text.tokens, **lengths, seconds=seconds)
    recipe = _recipe(task, text.vocabulary)
    batches = _Batches(task, text, recipe)
    listed = ways(task)
    taken = {way.title: _seconds_of_a_step(task, Run(task, way, recipe), batches) for way in listed}
    result("a step", ms={title: round(each * 1e3, 2) for title, each in taken.items()})
    steps = 2 * _TURN if task.tiny else _steps(task, list(taken.values()))
    if steps < 2 * _TURN:
        raise Failed(f"there is time for {max(steps, 0)} steps of each way, it takes {2 * _TURN}")
    runs = [Run(task, way, recipe) for way in listed]
    done = _train_in_turns(task, runs, batches, steps)
    if not done:
        raise Failed("no time was left once the models were made")
    for run in runs:
        result("train", way=run.way.title, steps=done, planned=steps, **_ended(task, run, batches))
    (task.out / "train.svg").write_text(draw([run.curve for run in runs]), encoding="utf-8")


def _recipe(task: Task, vocabulary: int) -> GPTRecipe:
    layers, width, heads, context = (2, 48, 2, 64) if task.tiny else (12, 768, 12, 1024)
    return GPTRecipe(
        lr=_LR,
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        seq_length=context,
        vocabulary=-(-vocabulary // 64) * 64,
        global_batch_size=_BATCH,
        micro_batch_size=_BATCH,
        train_steps=1,  # it says nothing here
    )


class _Batches:
    """Windows of the text, the same for every run."""

    def __init__(self, task: Task, text: Text, recipe: GPTRecipe) -> None:
        self.lines = {"train": text.train.to(task.device), "valid": text.valid.to(task.device)}
        self.length, self.count = recipe.seq_length, 4 if task.tiny else _BATCH
        self.tokens = self.count * self.length

    def take(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, ``(batch, length)``, of a step."""
        line = self.lines[split]
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(len(line) - self.length - 1, (self.count, 1), generator=generator)
        places = starts.to(line.device) + torch.arange(self.length + 1, device=line.device)
        windows = line[places].long()
        return windows[:, :-1], windows[:, 1:]


def _seconds_of_a_step(task: Task, run: Run, batches: _Batches) -> float:
    taken = []
    for number in range(3 if task.tiny else _PROBES):
        inputs, targets = batches.take("train", number)
        task.synchronize()
        start = time.perf_counter()
        run.step(inputs, targets, 0.5)
        task.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[len(taken) // 3 :])


def _steps(task: Task, seconds: Sequence[float]) -> int:
    """Return how many steps of each way there is time for."""
    by_the_end = 0.9 * (task.left - _ENDING) / sum(seconds)
    by_request = task.train_seconds / max(seconds)
    return int(min(by_the_end, by_request)) // _TURN * _TURN


def _train_in_turns(task: Task, runs: Sequence[Run], batches: _Batches, steps: int) -> int:
    """Train all runs; return how many steps each of them made before the time was over."""
    longest = 0.0
    with (task.out / "train.jsonl").open("a") as file:
        for first in range(0, steps, _TURN):
            if task.left - _ENDING < longest:
                return first
            begin = time.perf_counter()
            for run in runs:
                task.synchronize()
                start = time.perf_counter()
                losses = [
                    run.step(*batches.take("train", number), number / steps)
                    for number in range(first, first + _TURN)
                ]
                task.synchronize()
                run.seconds += time.perf_counter() - start
                loss, clipped = float(torch.stack(losses).mean()), run.clipped()
                run.curve.add(first + _TURN, loss, run.seconds, clipped)
                line = {"way": run.way.title, "step": first + _TURN, "clipped": clipped}
                # JSON has no NaN.
                line |= {"loss": loss if math.isfinite(loss) else None, "seconds": run.seconds}
                file.write(json.dumps(line) + "\n")
            file.flush()
            longest = max(longest, time.perf_counter() - begin)
    return steps


@torch.no_grad()
def _ended(task: Task, run: Run, batches: _Batches) -> dict[str, Any]:
    """Return what a run came to."""
    losses = []
    for number in range(2 if task.tiny else 8):
        with torch.autocast(task.device, torch.bfloat16):
            losses.append(float(run.model(*batches.take("valid", number))))
    steps = run.curve.steps[-1]
    return {
        "status": "run",
        "validation_loss": round(statistics.fmean(losses), 4),
        "training_loss": round(run.curve.losses[-1], 4),
        "clipped": run.clipped(),
        "tokens_per_s": round(steps * batches.tokens / run.seconds),
        "seconds": round(run.seconds, 2),
        "peak_gib_of_all": task.peak(),
    }
