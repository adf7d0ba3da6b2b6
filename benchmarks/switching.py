"""What becomes of a run that switches from AdamW to AdamW² half-way, or back (docs/switching.md).

    python -m benchmarks.switching [--seeds 0 1 2]

Trains the GPT of examples/compare (6 layers, width 64, β₂ 0.95, a cosine over 200 steps, no
warmup). After 100 steps the state dict of one optimizer goes into the other; data and schedule go
on. A row is a first half and a second; the columns are the validation loss at the end, and of the
step after the switch the share of matrices that were clipped and the median of α_W / α. About 6
minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from examples.compare.methods import adamw, adamw2
from examples.compare.train import TASKS, evaluate, schedule
from weyl_megatron import AdamW2

STEPS, SWITCH, BETA2 = 200, 100, 0.95

#: The τ of the second halves after AdamW; None is AdamW.
AFTER_ADAMW: tuple[float | str | None, ...] = (None, math.inf, 0.01, "balanced")

#: A norm, and rates: one at which AdamW trains, and one at which it ends worse or collapses.
CASES = (("pre", 3e-3), ("pre", 1e-2), ("post", 3e-3))


#: τ of the first half and of the second.
Halves = tuple[float | str | None, float | str | None]


class End(NamedTuple):
    """How a run ended, and what its first step after the switch did."""

    loss: float
    clipped: float
    rate: float


def optimizer_of(model: nn.Module, lr: float, tau: float | str | None) -> Optimizer:
    made = adamw(model, lr, BETA2) if tau is None else adamw2(tau, model, lr, BETA2)
    return made[0]


def steps(
    model: nn.Module, optimizer: Optimizer, lr: float, seed: int, span: range
) -> Iterator[None]:
    """Make the steps of a span; yield after each."""
    batches = TASKS["gpt"].batches(STEPS, seed)
    for step, (inputs, targets) in enumerate(batches):
        if step not in span:
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, STEPS, 0.0)
        model.zero_grad()
        model(inputs, targets).backward()
        optimizer.step()
        yield


def ends(norm: str, lr: float, seed: int) -> dict[Halves, End]:
    """Train both first halves, and go on from each in every way."""
    torch.manual_seed(seed)
    start = TASKS["gpt"].model(6, norm)
    results: dict[Halves, End] = {}
    for first, seconds in ((None, AFTER_ADAMW), ("balanced", ("balanced", None))):
        model = copy.deepcopy(start)
        before = optimizer_of(model, lr, first)
        list(steps(model, before, lr, seed, range(SWITCH)))
        state = copy.deepcopy(before.state_dict())
        for second in seconds:
            resumed = copy.deepcopy(model)
            after = optimizer_of(resumed, lr, second)
            after.load_state_dict(copy.deepcopy(state))
            clipped = rate = math.nan
            for number, _ in enumerate(steps(resumed, after, lr, seed, range(SWITCH, STEPS))):
                if number == 0 and isinstance(after, AdamW2):
                    entries = after.stats().values()
                    clipped = mean(entry.clipped for entry in entries)
                    rate = median(entry.lr for entry in entries) / after.param_groups[0]["lr"]
            loss, _ = evaluate(resumed, *TASKS["gpt"].held_out())
            results[first, second] = End(loss, clipped, rate)
    return results


def title(tau: float | str | None) -> str:
    return "AdamW" if tau is None else f"τ = {tau}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | steps 1 to 100 | steps 101 to 200 | loss | clipped | α_W / α |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for norm, lr in CASES:
        by_seed = [ends(norm, lr, seed) for seed in options.seeds]
        for first, second in by_seed[0]:
            runs = [results[first, second] for results in by_seed]
            losses = [run.loss for run in runs]
            error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
            clipped, rate = (mean(run[column] for run in runs) for column in (1, 2))
            cells = [f"{norm}-LN, lr {lr:g}", title(first), title(second)]
            cells += [f"{mean(losses):.3f} ± {error:.3f}"]
            cells += ["–", "–"] if math.isnan(rate) else [f"{clipped:.0%}", f"{rate:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
