from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import run_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")


@pytest.mark.slow
def test_one_rank_s_nan_skips_the_step_on_all(
    record_property: Callable[[str, object], None],
) -> None:
    record_property(
        "tried",
        "NaN and Inf in one gradient on one of 4 ranks: Megatron TP, PP, DP, experts, bf16, fp16",
    )
    said = run_ranks("megatron", Path(__file__).with_name("nonfinite_worker.py"), 4)
    results = [line for line in said.splitlines() if line.endswith(": as without that step")]
    assert len(results) == 14 and "DIFFERS" not in said, said
    assert (
        "is skipped, number 1 in a row: the gradient of decoder.layers.1.mlp.linear_fc2.weight is "
        "not finite" in said
    )
    record_property(
        "survived", "the step is skipped on all, named and counted; fp16's by Megatron's scaler"
    )
