"""Accelerate and the Trainer train under FSDP2 as one process does, and resume bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engines.huggingface.fsdp2_cases import LAUNCHES
from tests.processes import ROOT, run_ranks

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")


SLOW = [pytest.param(launch, marks=pytest.mark.slow) for launch in ("rest", "hsdp")]


@pytest.mark.parametrize("launch", ["quick", *SLOW])
def test_ten_steps_follow_one_process_and_resume_bit_for_bit(launch: str, tmp_path: Path) -> None:
    worker = ROOT / "tests/engines/huggingface/fsdp2_worker.py"
    ranks, cases = LAUNCHES[launch]
    printed = run_ranks("huggingface", worker, ranks, launch, str(tmp_path))
    assert printed.count("all agree") == ranks
    for case in cases:
        assert re.search(rf"^{re.escape(case.name)}: .*resumed: 0 of", printed, re.MULTILINE)
