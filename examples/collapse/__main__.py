"""The two ways in which attention dies without warmup, and AdamW² beside each.

    python -m examples.collapse [--out out/collapse]

About 1 minute on 2 cores. Trains a byte-level GPT on the standard library's sources four times,
watched every 10 steps, and writes OUT/report.html. You should see:

- post-LN at lr 3e-3: AdamW's attention goes uniform (rank collapse) and the loss stays at the
  bytes' unigram entropy, about 3.07 nats; AdamW² trains to about 2.5.
- pre-LN at lr 0.1: under AdamW heads of the first block fall to an entropy near 0 within 30 steps,
  σ₁(W_qᵀW_k) goes past 60 and the energy concentration SEC(16, 4) past 0.99 (the paper's collapse);
  AdamW² keeps σ₁ at a few and trains to about 2.6.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.report.report import write_report
from weyl_megatron.watch import Watch

BATCH, CONTEXT = 8, 64


@dataclass(frozen=True)
class Run:
    """One of the four runs. AdamW² with τ = ∞ is AdamW, bit for bit."""

    name: str
    title: str
    norm: str
    lr: float
    steps: int
    tau: float


RUNS = (
    Run("post-adamw", "post-LN, lr 0.003: AdamW", "post", 3e-3, 250, math.inf),
    Run("post-adamw2", "post-LN, lr 0.003: AdamW²", "post", 3e-3, 250, 0.01),
    Run("pre-adamw", "pre-LN, lr 0.1: AdamW", "pre", 0.1, 200, math.inf),
    Run("pre-adamw2", "pre-LN, lr 0.1: AdamW²", "pre", 0.1, 200, 0.01),
)


def train(run: Run, out: Path, seed: int, every: int = 10) -> Story:
    """Train one run, watched."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(norm=run.norm))
    optimizer = AdamW2(
        model.named_parameters(), lr=run.lr, betas=(0.9, 0.95), weight_decay=0.1, tau=run.tau
    )
    corpus = load_corpus()
    offsets = training_offsets(corpus, run.steps, BATCH, CONTEXT, seed)
    watch = Watch(model, optimizer, every=every, out=out / run.name, run=run.title, maps=range(4))
    losses, measured = [], []
    for step in range(run.steps):
        lr = run.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * step / run.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(*sequences(corpus.train, offsets[step], CONTEXT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values = watch.step(loss)
        losses.append(loss.item())
        if values:
            measured.append(values)
    watch.close()
    return Story(
        loss=sum(losses[-20:]) / 20,
        last_entropy=_mean(_of_heads(measured[-1], "entropy")),
        least_entropy=min(min(_of_heads(values, "entropy")) for values in measured),
        uniform=measured[-1]["uniform_entropy"],
        sigma_qk=max(max(_of_blocks(values, "sigma_qk")) for values in measured),
        sec=max(max(_of_heads(values, "sec")) for values in measured),
        similarity=max(_of_blocks(measured[-1], "similarity")),
    )


class Story(NamedTuple):
    """What happened in a run."""

    loss: float  # mean of the last 20 steps
    last_entropy: float  # at the end, mean over all heads, in nats
    least_entropy: float  # of any head, ever
    uniform: float  # the entropy of attention that takes the average
    sigma_qk: float  # the largest σ₁(W_qᵀW_k) of a block, ever
    sec: float  # the largest SEC(16, 4) of a head, ever
    similarity: float  # of tokens at the end, in the block where it is largest


def _of_heads(values: Mapping[str, float], name: str) -> list[float]:
    return [value for tag, value in values.items() if "/head/" in tag and tag.endswith(f"/{name}")]


def _of_blocks(values: Mapping[str, float], name: str) -> list[float]:
    blocks = ((tag, value) for tag, value in values.items() if tag.count("/") == 2)
    return [value for tag, value in blocks if tag.endswith(f"/{name}")]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/collapse"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    uniform = math.fsum(map(math.log, range(1, CONTEXT + 1))) / CONTEXT
    print(f"uniform attention has {uniform:.3f} nats")
    columns = "loss", "entropy", "least", "σ₁(WqᵀWk)", "SEC(16,4)", "similarity"
    print(" " * 27 + "".join(f"{column:>12}" for column in columns))
    for run in RUNS:
        (options.out / run.name / "stability.jsonl").unlink(missing_ok=True)
        story = train(run, options.out, options.seed)
        numbers = (
            story.loss,
            story.last_entropy,
            story.least_entropy,
            story.sigma_qk,
            story.sec,
            story.similarity,
        )
        print(f"{run.title:27}" + "".join(f"{number:12.3f}" for number in numbers), flush=True)
    page = options.out / "report.html"
    write_report([options.out / run.name for run in RUNS], page)
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
