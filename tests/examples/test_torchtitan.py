"""examples/torchtitan under torchtitan's own trainer, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.processes import torchrun

WORKER = Path(__file__).parent / "torchtitan_worker.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed"
)


def test_a_run_of_torchtitan_goes_on_exactly(tmp_path: Path) -> None:
    """FSDP2 on two ranks; its checkpoints are flat, by the names of parameters."""
    assert "done" in torchrun(WORKER, 2, str(tmp_path), "-1")
    assert "resumed at step 3: 0.0" in torchrun(WORKER, 2, str(tmp_path), "3")
