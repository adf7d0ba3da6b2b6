from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


@pytest.mark.slow
def test_a_jump_skips_the_step_on_all_ranks_and_of_experts() -> None:
    said = run_ranks("megatron", Path(__file__).with_name("spikes_worker.py"), 4)
    results = [line for line in said.splitlines() if line.endswith(": as without that step")]
    assert len(results) == 3 and "DIFFERS" not in said, said
    assert "the norm of all gradients (" in said
