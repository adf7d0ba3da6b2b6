"""How far projected updates exceed their bound, by exact singular values, in training runs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from examples.compare.methods import parameter_groups
from examples.compare.train import TASKS, schedule
from weyl_megatron import AdamW2
from weyl_megatron.reference import exact_sigma
from weyl_megatron.rule import balanced_floor

STEPS, DECAY, BETAS = 100, 0.1, (0.9, 0.95)


class Breach(NamedTuple):
    updates: Tensor  # σ₁(update) / c of all updates that were projected
    above: Tensor  # how far they were above it before, σ₁(α U) / c


def train(lr: float, vectors: int) -> Breach:
    """Train the GPT of examples/compare with six layers."""
    torch.manual_seed(3)
    task = TASKS["gpt"]
    model = task.model(6, "pre")
    optimizer = AdamW2(
        parameter_groups(model), lr=lr, betas=BETAS, tau="balanced", clip="project", vectors=vectors
    )
    named = dict(model.named_parameters())
    updates, above = [], []
    for step, (inputs, targets) in enumerate(task.batches(STEPS, 3)):
        rate = lr * schedule(step, STEPS, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model(inputs, targets).backward()
        before = {name: param.detach().double() for name, param in named.items()}
        optimizer.step()
        for name, entry in optimizer.stats().items():
            if entry.directions is None or entry.certified or not entry.clipped:
                continue
            change = (1 - rate * DECAY) * before[name] - named[name].detach().double()
            floor = balanced_floor(*change.shape)
            bound = entry.tau * max(exact_sigma(before[name]), floor)
            updates.append(exact_sigma(change) / bound)
            above.append(rate * entry.sigma_update / bound)
            assert entry.directions >= 1 and 0 < entry.share < 1 and 0 < entry.unseen <= 1
    return Breach(torch.tensor(updates), torch.tensor(above))


@pytest.mark.parametrize("vectors", [8, 16])
def test_an_update_that_was_ten_times_its_bound_keeps_to_it(vectors: int) -> None:
    breach = train(0.03, vectors)
    median, p95 = (float(breach.updates.quantile(share)) for share in (0.5, 0.95))
    print(
        f"{vectors} vectors, {len(breach.updates)} projected updates, before "
        f"{float(breach.above.median()):.1f} times the bound: σ₁(update)/c is {median:.3f} in the "
        f"median, {p95:.3f} at the 95th percentile, {float(breach.updates.max()):.2f} at most"
    )
    assert len(breach.updates) > 20 * STEPS and breach.above.median() > 10
    assert median < 1.05 and p95 < 1.25 and breach.updates.max() < 1.6
