"""The two ways in which attention dies without warmup, and AdamW² beside each.

    python -m examples.collapse [--out out/collapse]        about 1 minute on one core

Trains a byte-level GPT on the standard library's sources four times, watched every 10 steps, and writes
OUT/report.html. You should see:

- post-LN at lr 3e-3: AdamW's attention goes uniform (rank collapse) and the loss stays at the bytes' unigram entropy,
  about 3.07 nats; AdamW² trains to about 2.5.
- pre-LN at lr 0.1: AdamW's attention entropy goes to 0, σ₁(W_qᵀW_k) past 60 and the energy concentration SEC(16, 4)
  past 0.99 (the paper's collapse); AdamW² keeps σ₁ at a few and trains to about 2.6.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets

# REPORT
from weyl_megatron.stability.watch import Watch

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


def train(run: Run, out: Path, seed: int, every: int = 10) -> dict[str, float]:
    """Train one run and return its last measurement, with the mean loss of the last 20 steps as ``final_loss``."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(norm=run.norm))
    optimizer = AdamW2(model.named_parameters(), lr=run.lr, betas=(0.9, 0.95), weight_decay=0.1, tau=run.tau)
    corpus = load_corpus()
    offsets = training_offsets(corpus, run.steps, BATCH, CONTEXT, seed)
    watch = Watch(model, optimizer, every=every, out=out / run.name, run=run.title, maps=range(4))
    losses = []
    for step in range(run.steps):
        lr = run.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * step / run.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(*sequences(corpus.train, offsets[step], CONTEXT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss)
        losses.append(loss.item())
    watch.close()
    return {**watch.values, "final_loss": sum(losses[-20:]) / 20}


def summary(values: dict[str, float]) -> dict[str, float]:
    """The numbers of the story: over all heads of all blocks."""

    def over_heads(name: str) -> list[float]:
        return [value for tag, value in values.items() if "/head/" in tag and tag.endswith(f"/{name}")]

    entropies = over_heads("entropy")
    return {
        "loss": values["final_loss"],
        "entropy": sum(entropies) / len(entropies),
        "uniform": values["uniform_entropy"],
        "sigma_qk": max(over_heads("sigma_qk")),
        "sec": max(over_heads("sec")),
        "similarity": max(value for tag, value in values.items() if tag.endswith("/similarity")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/collapse"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'run':30} {'loss':>6} {'entropy':>8} {'uniform':>8} {'σ₁(WqᵀWk)':>10} {'SEC(16,4)':>9} {'similarity':>10}")
    for run in RUNS:
        (options.out / run.name / "stability.jsonl").unlink(missing_ok=True)
        began = time.monotonic()
        found = summary(train(run, options.out, options.seed))
        print(
            f"{run.title:30} {found['loss']:6.3f} {found['entropy']:8.3f} {found['uniform']:8.3f} "
            f"{found['sigma_qk']:10.2f} {found['sec']:9.4f} {found['similarity']:10.3f}   {time.monotonic() - began:.0f} s",
            flush=True,
        )
    page = options.out / "report.html"
    write_report([options.out / run.name for run in RUNS], page)
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
