"""What torch spreads over meshes of ranks (FSDP2, HSDP, tensor parallelism, both together), on real
processes against one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import fsdp2
from tests.engines.torch.meshes import CASES
from tests.processes import run_ranks

WORKER = Path(__file__).with_name("mesh_worker.py")
CHECKPOINTS = Path(__file__).with_name("mesh_checkpoint_worker.py")
FAULTS = Path(__file__).with_name("mesh_faults_worker.py")
PAGE = Path(__file__).parents[3] / "docs" / "fsdp2.md"

Rows = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Rows]:
    """What became of every case of so many ranks, which are started once."""
    outcomes: dict[int, Rows] = {}
    folder = tmp_path_factory.mktemp("mesh")

    def rows(world: int) -> Rows:
        if world not in outcomes:
            outcomes[world] = {}  # a launch that fails is not repeated for every row
            path = folder / f"{world}.json"
            run_ranks("torch", WORKER, world, str(path))
            outcomes[world] = json.loads(path.read_text())
        return outcomes[world]

    return rows


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(
            world,
            case.name,
            id=f"{world} ranks, {case.name}",
            marks=() if world in (2, 4) else pytest.mark.slow,
        )
        for world, cases in CASES.items()
        for case in cases
    ],
)
def test_a_spread_model_trains_as_one_process_trains_it(
    world: int, case: str, rows_of: Callable[[int], Rows]
) -> None:
    """See mesh_worker.py: weights to 1e-5, statistics and copies alike on all ranks; or, where this
    torch cannot spread a model so, what torch says of it.
    """
    ((outcome, said),) = rows_of(world)[case].items()
    if outcome == "lacks":
        pytest.skip(f"torch: {said}")
    assert outcome == "agrees", said


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("`Shard(1)` for some parameters", fsdp2.lacking("shard_placement_fn")),
        ("`ignored_params`", fsdp2.lacking("ignored_params")),
        ("FSDP2 × tensor parallelism, uneven", fsdp2.lacking(uneven=True)),
    ],
)
def test_the_page_says_which_torch_a_row_begins_with(row: str, sentence: str | None) -> None:
    """So that no newer torch passes a row over."""
    page = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines()]
    (first,) = (cells[3] for cells in page if cells[0] == row and len(cells) == 5)
    (said,) = (cells[1] for cells in page if cells[0] == row and len(cells) == 2)
    installed, begins = (
        tuple(map(int, version.split(".")[:2])) for version in (torch.__version__, first)
    )
    assert (sentence is None) == (installed >= begins)
    assert said == f'"{sentence}"' or sentence is None


def test_a_distributed_checkpoint_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    """Bit for bit where the layout is the same; nested and flat; saved by 2 ranks, anew by 3, and
    read by 1; from AdamW and to it.
    """
    assert "done" in run_ranks("torch", CHECKPOINTS, 2, "save", "fsdp", str(tmp_path))
    for world, layout in ((2, "fsdp"), (3, "fsdp"), (1, "whole"), (4, "fsdp_tp")):
        printed = run_ranks("torch", CHECKPOINTS, world, "load", layout, str(tmp_path))
        assert printed.count("done") == world
        assert (world, layout) != (2, "fsdp") or printed.count("bit for bit") == 5


def test_what_cannot_be_stepped_is_said_on_every_rank() -> None:
    """See mesh_faults_worker.py."""
    printed = run_ranks("torch", FAULTS, 2)
    assert printed.count("all said") == 2


def test_collectives_do_not_grow_with_depth() -> None:
    """See mesh_faults_worker.py: of one block and of four, scaled and projected."""
    printed = run_ranks("torch", FAULTS, 2, "depth")
    assert printed.count("as many collectives") == 2
