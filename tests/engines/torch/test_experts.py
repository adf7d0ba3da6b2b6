"""Stacks of experts over an expert mesh dimension, by real processes against one."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_ranks


def test_stacks_of_experts_step_as_on_one_process() -> None:
    assert "all agree" in run_ranks("torch", Path(__file__).parent / "experts_worker.py", 4)
