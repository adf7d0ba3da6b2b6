"""The short form of `make soak`: 120 steps under ZeRO-3 with kills, stops and resizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import passes, soak

pytest.importorskip("deepspeed")


@pytest.mark.slow
def test_a_run_that_is_stopped_killed_and_resized_is_the_one_that_is_left_alone(
    tmp_path: Path,
) -> None:
    result = soak(120, 0, tmp_path / "soak")
    print(result)
    assert passes(result), result
    assert "kill" in result["events"] and "resize" in result["events"]
    assert result["checks"] > 0
