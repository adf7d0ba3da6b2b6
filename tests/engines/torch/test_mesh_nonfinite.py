from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_nan_in_one_rank_s_gradients_is_refused_by_all_alike(ranks: int) -> None:
    printed = run_ranks("torch", Path(__file__).parent / "mesh_nonfinite_worker.py", ranks)
    assert "all refuse alike" in printed
