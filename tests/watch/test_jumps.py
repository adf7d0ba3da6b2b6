"""Spikes that an optimizer found, in a run's file and where its sinks reach people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron import AdamW2
from weyl_megatron.spikes import Jump
from weyl_megatron.watch import Watch
from weyl_megatron.watch.jumps import Told, together

STEPS, BAD = 60, 50


class Phone:
    """A sink that can alert."""

    def __init__(self) -> None:
        self.alerts: list[tuple[int, str, str]] = []

    def write(self, step: int, values: Any) -> None: ...

    def close(self) -> None: ...

    def alert(self, step: int, title: str, text: str) -> None:
        self.alerts.append((step, title, text))


def watched(out: Path, spike: str, every: int, steps: int = STEPS) -> tuple[Phone, AdamW2]:
    """Train on noise whose gradients are of one size, but for one step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1, context=16, width=32))
    optimizer = AdamW2(model.named_parameters(), lr=1e-4, model=model, spike=spike)
    phone = Phone()
    watch = Watch(model, optimizer, every=every, out=out, sinks=[phone])
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        text = torch.randint(256, (2, 17), generator=generator)
        loss = model(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        (loss * (1e3 if step == BAD else 1.0)).backward()
        optimizer.step()
        watch.step(loss)
    watch.close()
    return phone, optimizer


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "stability.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("every", [5, 1000])  # the second: what is left is written at the end
@pytest.mark.parametrize("spike", ["log", "skip"])
def test_a_spike_is_written_once_at_its_step(tmp_path: Path, spike: str, every: int) -> None:
    phone, optimizer = watched(tmp_path, spike, every)
    assert optimizer.skipped_steps == (spike == "skip")
    (event,) = events(tmp_path, "spike")
    assert (event["step"], event["action"]) == (BAD, spike)
    scores = [matrix["z"] for matrix in event["matrices"]]
    assert scores and scores == sorted(scores, reverse=True)
    ((step, title, text),) = phone.alerts
    assert (step, title) == (BAD, "Norms jump")
    assert event["matrices"][0]["name"] in text and ("skipped" in text) == (spike == "skip")


def test_nothing_is_written_of_a_run_without(tmp_path: Path) -> None:
    phone, _ = watched(tmp_path, "log", 10, BAD - 1)
    assert not events(tmp_path, "spike") and not phone.alerts


def test_what_several_ranks_saw_is_one() -> None:
    first, second = Jump("a", 3.0, 1.0, 9.0), Jump("b", 4.0, 1.0, 8.0)
    told = together(
        [[Told(7, "log", {"a": first})], [], [Told(7, "log", {"a": first, "b": second})]]
    )
    assert told == [Told(7, "log", {"a": first, "b": second})]
