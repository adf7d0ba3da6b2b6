"""torch's distributed checkpoints beside plain PyTorch and DDP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_bit_for_bit_from_torch_s_distributed_checkpoint(
    ranks: int, tmp_path: Path
) -> None:
    worker = Path(__file__).with_name("dcp_worker.py")
    assert "resumed bit for bit" in run_ranks("torch", worker, ranks, str(tmp_path))
