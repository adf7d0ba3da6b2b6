"""What torch spreads over meshes of ranks (FSDP2, HSDP, tensor parallelism, both together), on real
processes against one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.torch.meshes import CASES, HAS_FSDP2, runs
from tests.processes import run_ranks

WORKER = Path(__file__).with_name("mesh_worker.py")
CHECKPOINTS = Path(__file__).with_name("mesh_checkpoint_worker.py")
FAULTS = Path(__file__).with_name("mesh_faults_worker.py")

needs_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 of this torch needs a GPU")


@pytest.mark.parametrize(
    "world", [2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5, 6, 8))]
)
def test_a_spread_model_trains_as_one_process_trains_it(world: int) -> None:
    """See mesh_worker.py: weights to 1e-5, statistics and copies alike on all ranks."""
    printed = run_ranks("torch", WORKER, world)
    assert printed.count("all agree") == world
    for case in filter(runs, CASES[world]):
        assert f"{case.name}: " in printed


@needs_fsdp2
def test_a_distributed_checkpoint_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    """Bit for bit where the layout is the same; nested and flat; from AdamW and to it."""
    assert "done" in run_ranks("torch", CHECKPOINTS, 2, "save", "fsdp", str(tmp_path))
    for world, layout in ((2, "fsdp"), (3, "fsdp"), (1, "whole"), (4, "fsdp_tp")):
        printed = run_ranks("torch", CHECKPOINTS, world, "load", layout, str(tmp_path))
        assert printed.count("done") == world
        assert (world, layout) != (2, "fsdp") or printed.count("bit for bit") == 5


@needs_fsdp2
def test_what_cannot_be_stepped_is_said_on_every_rank() -> None:
    """See mesh_faults_worker.py."""
    printed = run_ranks("torch", FAULTS, 2)
    assert printed.count("all said") == 2


@needs_fsdp2
def test_collectives_do_not_grow_with_depth() -> None:
    """See mesh_faults_worker.py: of one block and of four, scaled and projected."""
    printed = run_ranks("torch", FAULTS, 2, "depth")
    assert printed.count("as many collectives") == 2
