from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.mark.slow
def test_a_jump_skips_the_step_on_all_ranks_and_in_all_its_parts() -> None:
    """By the norm that DeepSpeed takes before it clips; stage 0 reads the gradients, clipped."""
    said = run_ranks("deepspeed", Path(__file__).with_name("spikes_worker.py"), 2)
    results = [line for line in said.splitlines() if line.endswith(": as without that step")]
    assert len(results) == 7 and "DIFFERS" not in said, said
    assert "the norm of all gradients (" in said
    assert "matrices have the same norms" in said
    assert "not told: AdamW2: spike got 'skip' where no norm of all gradients is told" in said
