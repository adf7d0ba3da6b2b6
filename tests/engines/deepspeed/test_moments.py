"""M and V in bfloat16 under DeepSpeed: as on one process, and resumed bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

pytestmark = pytest.mark.slow

NAMES = (
    "ZeRO-1",
    "ZeRO-2",
    "ZeRO-3",
    "ZeRO-2, projected",
    "ZeRO-2, offload",
    "ZeRO-3, offload",
    "bf16 states",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("moments")
    output = run_ranks("deepspeed", Path(__file__).with_name("moments_worker.py"), 2, str(folder))
    line = next(line for line in output.splitlines() if "moments {" in line)
    measured: dict[str, Any] = json.loads(line.split("moments ", 1)[1])
    return measured


@pytest.mark.parametrize("name", NAMES)
def test_six_steps_follow_one_process_and_are_resumed_bit_for_bit(
    found: dict[str, Any], name: str, record_property: Callable[[str, object], None]
) -> None:
    entry = found[name]
    print(f"\n{name}: {entry}")
    # Sums in another order flip a few of bfloat16's roundings; where gradients are in bfloat16,
    # too, those are summed in it in another order.
    share = 2 if name == "bf16 states" else 0.05
    assert entry["apart"] < share * entry["of rounding"]
    assert entry["resumed"]
    record_property("tried", f"DeepSpeed, M and V in bfloat16, {name}, saved and resumed")
    record_property("survived", "bit for bit")


def test_v_is_in_float32_where_bfloat16_would_freeze_it(found: dict[str, Any]) -> None:
    for name, entry in found.items():
        is_frozen = name == "bf16 states"
        assert entry["v"] == ["torch.float32" if is_frozen else "torch.bfloat16"]
        assert "torch.bfloat16" in entry["kept"]
