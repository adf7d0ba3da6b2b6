"""AdamW2 passes what torch.optim.AdamW passes of torch's optimizer suite, or has its reason here.

A cell is a check of one variant on one input that torch ships for AdamW. Every cell runs, with
warnings as errors, on AdamW, on AdamW2 at τ = ∞, where what was stepped has AdamW's bits, and at
τ = 0.01; in a process of its own, because torch's test modules change its global flags.
``python -m tests.torch_suite --failures`` is that process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from tests.processes import HANGS, ROOT
from tests.torch_suite.__main__ import table
from tests.torch_suite.cells import ADAMW, BOUNDED, CHECKS, UNBOUNDED, Cell
from weyl_megatron import AdamW2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None, reason="torch's test modules import expecttest"
)

#: What AdamW2 refuses of what AdamW takes, by pattern of the cell's name; see docs/drop_in.md.
EXCEPTIONS = {
    "* & differentiable": "the step is made by kernels that autograd does not see",
    "complex_weights_*": "σ₁ is measured, and the step made, of real matrices",
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    file = tmp_path_factory.mktemp("torch_suite") / "cells.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.torch_suite", "--json", str(file)],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode == 0, f"the suite ended with {run.returncode}:\n{run.stderr[-6000:]}"
    return [Cell(**cell) for cell in json.loads(file.read_text(encoding="utf-8"))]


def _is_excepted(cell: Cell) -> bool:
    return any(fnmatchcase(cell.name, pattern) for pattern in EXCEPTIONS)


@pytest.mark.parametrize("check", CHECKS)
def test_adamw2_passes_every_cell_that_adamw_passes(check: str, cells: list[Cell]) -> None:
    passed = [cell for cell in cells if cell.check == check and cell.failures[ADAMW] is None]
    failed = [
        f"{cell.name} at {contender}: {cell.failures[contender]}"
        for cell in passed
        if not _is_excepted(cell)
        for contender in (UNBOUNDED, BOUNDED)
        if cell.failures[contender] is not None
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("pattern", EXCEPTIONS)
def test_what_is_excepted_is_refused_in_one_sentence(pattern: str, cells: list[Cell]) -> None:
    excepted = [cell for cell in cells if fnmatchcase(cell.name, pattern)]
    assert excepted
    for cell in excepted:
        assert cell.failures[ADAMW] is None, f"{cell.name}: {cell.failures[ADAMW]}"
        for contender in (UNBOUNDED, BOUNDED):
            failure = cell.failures[contender]
            assert failure is not None, f"{cell.name} passes at {contender}: it is no exception"
            assert failure.startswith("ValueError: AdamW2: "), f"{cell.name}: {failure}"


def test_the_exceptions_are_few(cells: list[Cell]) -> None:
    print("\n" + table(cells))
    passed = Counter(name for cell in cells for name, how in cell.failures.items() if how is None)
    assert passed[ADAMW] >= 332, f"AdamW itself fails checks:\n{table(cells)}"
    assert min(passed[UNBOUNDED], passed[BOUNDED]) >= 290, table(cells)


def test_sparse_gradients_are_refused_as_by_adamw() -> None:
    for build in (torch.optim.AdamW, AdamW2):
        weight = torch.nn.Parameter(torch.randn(5, 2))
        optimizer = build([weight])
        row = torch.ones(1, 2)
        weight.grad = torch.sparse_coo_tensor([[1]], row, (5, 2), check_invariants=True)
        with pytest.raises((RuntimeError, ValueError), match="sparse"):
            optimizer.step()


@pytest.mark.parametrize(
    "flags",
    [
        {"foreach": True, "fused": True},
        {"foreach": True, "lr": torch.tensor(0.1)},
        {"foreach": True, "betas": (torch.tensor(0.9), torch.tensor(0.99))},
        {"betas": (0.9, torch.tensor(0.99))},
        {"eps": -1.0},
    ],
    ids=str,
)
def test_arguments_that_adamw_refuses_have_its_error_in_ours(flags: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 2))
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        torch.optim.AdamW([weight], **flags)
    with pytest.raises(theirs.type, match=r"^AdamW2: ") as ours:
        AdamW2([weight], **flags)
    assert str(theirs.value).rstrip(".") in str(ours.value)
