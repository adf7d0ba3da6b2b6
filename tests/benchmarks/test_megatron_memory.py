"""What training under Megatron keeps, as the benchmark's table has it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


@pytest.mark.slow
def test_the_options_that_save_memory_save_what_they_are_for() -> None:
    command = [sys.executable, "-m", "benchmarks.megatron_memory", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()]
    table = [tuple(map(float, row[1:])) for row in rows if len(row) == 8 and "." in row[-1]]
    adam, usual, narrow, gradients, offloaded, both = table
    # Weights, gradients, masters, moments: bytes a parameter, by their dtypes.
    assert adam[:4] == usual[:4] == (2, 4, 4, 8) and adam[-1] == usual[-1] == 0
    assert narrow[:4] == (2, 4, 4, 4)
    assert gradients[:4] == both[:4] == (2, 2, 4, 4)
    assert offloaded[:4] == (2, 4, 4, 8)
    for row, first in ((offloaded, 8 + 4 + 4), (both, 4 + 4 + 4)):  # and gradients, on the host
        assert first <= row[-1] < first + 0.1
    assert adam[4] == 0 and 0 < usual[4] < 0.1  # the power vectors
