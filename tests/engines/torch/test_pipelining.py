"""torch.distributed.pipelining: every stage has an AdamW2 of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import run_ranks
from weyl_megatron import AdamW2

WORKER = Path(__file__).parent / "pipeline_worker.py"


@pytest.mark.parametrize("ranks", [2, 4])
def test_stages_train_as_one_process_does(ranks: int) -> None:
    """On 4 ranks FSDP2 shards each stage."""
    assert "all agree" in run_ranks("torch", WORKER, ranks)


@pytest.mark.parametrize("given", ["pp", 3, object])
def test_what_is_no_process_group_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"^AdamW2: budget_group got .*, it takes a process group"):
        AdamW2([torch.nn.Parameter(torch.ones(2, 2))], budget_group=given)  # type: ignore[arg-type]
