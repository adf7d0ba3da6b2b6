from __future__ import annotations

import json

import pytest
import torch

from weyl_megatron.demo.recipe import (
    ADAMW2_AUTO,
    ADAMW_ALONE,
    ADAMW_WARMUP,
    END_LR,
    GLOBAL_BATCH,
    PEAK_LR,
    RUNS,
    deepspeed_config,
    learning_rate,
    schedule,
    sequences_per_rank,
    warmup_steps,
)

STEPS = 100


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_schedule_has_the_same_peak_and_end(run) -> None:
    rates = [learning_rate(run, step, STEPS) for step in range(STEPS + 1)]
    assert max(rates) == pytest.approx(PEAK_LR) and rates[STEPS] == pytest.approx(END_LR)


def test_only_the_warmup_run_warms_up() -> None:
    assert (
        learning_rate(ADAMW_ALONE, 0, STEPS)
        == learning_rate(ADAMW2_AUTO, 0, STEPS)
        == pytest.approx(PEAK_LR)
    )
    warmup = warmup_steps(STEPS)
    rates = [learning_rate(ADAMW_WARMUP, step, STEPS) for step in range(warmup)]
    assert (
        rates[0] == pytest.approx(PEAK_LR / warmup)
        and rates == sorted(rates)
        and rates[-1] == pytest.approx(PEAK_LR)
    )


def test_the_scheduler_sets_these_rates() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK_LR)
    scheduler = schedule(ADAMW_WARMUP, STEPS)(optimizer)
    for step in range(STEPS):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            learning_rate(ADAMW_WARMUP, step, STEPS)
        )
        optimizer.step()
        scheduler.step()


def test_the_configurations_are_json_and_differ_in_the_optimizer_alone() -> None:
    configs = [json.loads(json.dumps(deepspeed_config(run, 2, bf16=False))) for run in RUNS]
    optimizers = [config.pop("optimizer") for config in configs]
    assert all(config == configs[0] for config in configs)
    assert optimizers[0] == optimizers[1]
    for optimizer in optimizers[2:]:
        assert optimizer.pop("type") == "AdamW2"
        del optimizer["params"]["tau"]
        optimizer["params"].pop("clip", None)
        assert optimizer["params"] == optimizers[0]["params"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
def test_ranks_make_up_the_global_batch(ranks: int) -> None:
    assert GLOBAL_BATCH <= sequences_per_rank(ranks) * ranks < GLOBAL_BATCH + ranks
