"""ZeRO-3 with what it steps in files (DeepSpeed's NVMe offload) does what it does in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks

WORKER = Path(__file__).with_name("nvme_worker.py")

pytestmark = pytest.mark.slow  # 50 s, and minutes where the op is not compiled yet

#: Seconds. DeepSpeed compiles its op for files in the first launch, which takes minutes.
COMPILES = 3600.0


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if shutil.which("g++") is None:
        pytest.skip("no compiler for DeepSpeed's async_io")
    folder = tmp_path_factory.mktemp("nvme")
    output = run_ranks("deepspeed", WORKER, 2, str(folder), timeout=COMPILES)
    if "nvme skipped" in output:
        pytest.skip("DeepSpeed's async_io needs libaio-dev, and DeepSpeed 0.19")
    output += run_ranks("deepspeed", WORKER, 1, str(folder), "load")
    lines = [line.split(" ", 2) for line in output.splitlines() if line.startswith("nvme ")]
    return {name: json.loads(result) for _, name, result in lines}


CASES = ["plain", "pipelined", "projected", "bf16", "parameters"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_files_is_stepped_as_in_memory_and_resumes_bit_for_bit(
    said: dict[str, Any], name: str
) -> None:
    for rank in said[name]:
        # The two large matrices; what is under 1 MiB stays in memory.
        assert rank["optimizer"] == [True, True, False, False]
        assert rank["parameters"] == [name == "parameters"] * 4
        assert rank["memory"] == rank["resumed"] == rank["twice"] == {}
        # Sums in another order: measured 7e-7.
        assert rank["gap"] < 1e-5
        assert rank["stats"] == [f"stats.{name}.weight" for name in ("down", "head", "up")]
        assert rank["clipped"], "nothing was clipped: the case shows nothing"


def test_weights_and_checkpoints_that_are_others_are_refused(said: dict[str, Any]) -> None:
    sentences = said["refusals"]
    assert sentences["moved"].startswith(
        "AdamW2: DeepSpeed ZeRO-3's partition does not hold the weights of parameter 'up.weight'"
    )
    assert sentences["other names"].startswith(
        "AdamW2: offload_optimizer.device 'nvme' got a checkpoint without a file "
    )
    assert sentences["set"] == ""
    assert said["load"] == (
        "AdamW2: offload_optimizer.device 'nvme' got a checkpoint of 2 data-parallel ranks, it "
        "takes one of 1."
    )
