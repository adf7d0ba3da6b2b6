"""One run: a task, a model, a method, a rate and a seed, trained and scored on what is held out."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import weyl_megatron
from examples.collapse.model import GPT, GPTConfig
from examples.compare import vit
from examples.compare.methods import METHODS
from weyl_megatron.demo import data

BATCH, CONTEXT, WINDOWS = 8, 64, 128
WIDTH = GPTConfig().width


@dataclass(frozen=True)
class Run:
    """All that tells one run from another."""

    task: str
    depth: int
    norm: str
    method: str
    lr: float
    seed: int
    beta2: float
    steps: int
    warmup: float  # the share of the steps
    # What a result's line does not have is these.
    width: int = WIDTH
    batch: int = 0  # sequences or images a step; 0: the task's own


@dataclass(frozen=True)
class Task:
    """A model and its data; models return logits, or with targets the mean cross-entropy."""

    steps: int  # by default
    batch: int  # by default
    score: str  # what is reported: "loss" or "accuracy"
    model: Callable[..., nn.Module]  # of depth, norm and width
    batches: Callable[..., Iterator[tuple[Tensor, Tensor]]]  # of steps, seed and batch
    held_out: Callable[[], tuple[Tensor, Tensor]]


@cache
def corpus() -> data.Corpus:
    return data.load_corpus()


def gpt(depth: int, norm: str, width: int = WIDTH) -> GPT:
    return GPT(GPTConfig(norm=norm, layers=depth, context=CONTEXT, width=width))


def text_batches(steps: int, seed: int, batch: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    for offsets in data.training_offsets(corpus(), steps, batch, CONTEXT, seed):
        yield data.sequences(corpus().train, offsets, CONTEXT)


def held_out_text() -> tuple[Tensor, Tensor]:
    offsets = data.validation_offsets(corpus(), WINDOWS, CONTEXT)
    return data.sequences(corpus().validation, offsets, CONTEXT)


TASKS = {
    "gpt": Task(
        steps=200,
        batch=BATCH,
        score="loss",
        model=gpt,
        batches=text_batches,
        held_out=held_out_text,
    ),
    "vit": Task(
        steps=200,
        batch=vit.BATCH,
        score="accuracy",
        model=vit.ViT,
        batches=vit.batches,
        held_out=lambda: vit.digits()[1],
    ),
}


def schedule(step: int, steps: int, warmup: float) -> float:
    """The rate at `step` (from 0) as a share of its peak.

    Linear over the warmup, then a cosine to a tenth.
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def train(run: Run) -> dict[str, Any]:
    """The run's settings and how it ended.

    `diverged`: the loss is not finite, or above the one that it started from.
    """
    task, method = TASKS[run.task], METHODS[run.method]
    # In a process's first run this reads the data, which is not to count as that run's time.
    held_out = task.held_out()
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    model = task.model(run.depth, run.norm, run.width)
    if method.convert is not None:
        method.convert(model)
    optimizers = method.optimizers(model, run.lr, run.beta2)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    batches = task.batches(run.steps, run.seed, run.batch or task.batch)
    for step, (inputs, targets) in enumerate(batches):
        for group in groups:
            warmup = run.warmup if method.warms_all or group["is_hidden"] else 0.0
            group["lr"] = run.lr * schedule(step, run.steps, warmup)
        loss = model(inputs, targets)
        if step == 0:
            first = loss.item()
        if not math.isfinite(loss.item()):
            break
        model.zero_grad()
        loss.backward()
        if method.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), method.clip)
        for optimizer in optimizers:
            optimizer.step()
    loss, accuracy = evaluate(model, *held_out)
    is_finite = math.isfinite(loss)
    return {
        **asdict(run),
        "loss": loss if is_finite else None,
        "accuracy": accuracy if is_finite else None,
        "diverged": not is_finite or loss > first,
        "seconds": round(time.perf_counter() - start, 2),
        "version": weyl_megatron.__version__,
        "torch": torch.__version__,
    }


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """The mean cross-entropy in nats and the share of right answers."""
    model.eval()
    logits = model(inputs).flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, targets.flatten())
    return loss.item(), (logits.argmax(-1) == targets.flatten()).float().mean().item()


def badness(result: Mapping[str, Any]) -> tuple[float, ...]:
    """What the smallest of is best: by the task's score, and infinite where the run diverged."""
    if result["diverged"]:
        return (math.inf, math.inf)
    if TASKS[result["task"]].score == "loss":
        return (result["loss"],)
    return (-result["accuracy"], result["loss"])


def be_a_worker() -> None:
    """Set up a process that trains: one thread, and no life beyond the command's."""
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_the_parent, daemon=True).start()


def _die_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
