"""Matrices that real processes have cut, in Triton's kernels, under its interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.interpreter import needs_interpreter
from tests.processes import run_ranks
from weyl_megatron.kernels.choice import VARIABLE

pytestmark = needs_interpreter


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_step_cut_matrices_as_one_process_does(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal rates and σ₁ on all of them, the same bits in every run, in clipped, settled and sure
    steps.
    """
    monkeypatch.setenv(VARIABLE, "triton")
    printed = run_ranks("torch", Path(__file__).with_name("ranks_worker.py"), world)
    assert "ranks agree" in printed
