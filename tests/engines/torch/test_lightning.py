"""Lightning's ModelParallelStrategy; where Lightning is installed, which nothing here asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import ROOT, run_ranks


@pytest.mark.slow
def test_a_module_under_fsdp2_follows_one_process_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    worker = ROOT / "tests/engines/torch/lightning_worker.py"
    printed = run_ranks("torch", worker, 2, str(tmp_path))
    assert printed.count("all agree") == 2
