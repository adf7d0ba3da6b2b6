"""What the demo's worker writes of a step; tests/demo/test_demo.py runs it whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist

from tests.demo.synthetic import SHAPE
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.demo import train
from weyl_megatron.demo.model import GPT
from weyl_megatron.demo.recipe import ADAMW2_PROJECT

KEYS = ("directions", "share", "unseen")


def logged(
    out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[dict[str, Any], dict[str, MatrixStats]]:
    """What the log has of a first step, and what the optimizer says of it."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    torch.manual_seed(0)
    model = GPT(SHAPE)
    optimizer = AdamW2(model.named_parameters(), lr=0.05, model=model, **options)
    tokens = torch.randint(256, (train.VALIDATION_WINDOWS, 9))
    batches = SimpleNamespace(validation=(tokens[:, :-1], tokens[:, 1:]))
    engine = SimpleNamespace(basic_optimizer=optimizer, module=model)
    loss = model(tokens[:8, :-1], tokens[:8, 1:])
    loss.backward()
    optimizer.step()
    log = train.Log(out)
    log.start(ADAMW2_PROJECT, 1, {})
    log.step(engine, 1, loss.item(), 0.05, batches)
    log.end(loss.item())
    lines = (out / ADAMW2_PROJECT.name / "log.jsonl").read_text().splitlines()
    start, record, end = map(json.loads, lines)
    assert [each["event"] for each in (start, record, end)] == ["start", "step", "end"]
    return record, optimizer.stats()


def test_of_projected_matrices_it_says_what_was_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, stats = logged(tmp_path, monkeypatch, tau="balanced", clip="project", vectors=3)
    hidden = {name for name in stats if name.startswith("h.")}
    assert record["alpha"].keys() == stats.keys() > hidden
    for key in KEYS:
        expected = {name: pytest.approx(getattr(stats[name], key), rel=1e-4) for name in hidden}
        assert record[key] == expected, key
    assert all(0 < count <= 3 for count in record["directions"].values())
    assert all(0 < share < 1 for key in KEYS[1:] for share in record[key].values())


def test_of_a_scaled_run_it_says_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, stats = logged(tmp_path, monkeypatch)
    assert record["alpha"].keys() == stats.keys() and not record.keys() & set(KEYS)
