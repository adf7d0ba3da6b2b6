from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scale_count import STATES
from benchmarks.scale_models import Spread
from tests.benchmarks.scale_worker import MODEL
from tests.benchmarks.test_scale import counts
from tests.processes import run_ranks


def test_stand_ins_count_what_real_dtensors_count(tmp_path: Path) -> None:
    run_ranks("torch", Path(__file__).parent / "scale_mesh_worker.py", 4, str(tmp_path))
    real = json.loads((tmp_path / "counts.json").read_text())
    for zero, clips in real.items():
        for clip, states in clips.items():
            planned = counts(MODEL, Spread(dp=4, zero=zero), clip)
            for state, counted in states.items():
                row = [planned[state][key] for key in ("collectives", "bytes", "vectors")]
                assert row == counted, (zero, clip, state)


@pytest.mark.parametrize("zero", ["fsdp", "hsdp2"])
def test_collectives_do_not_depend_on_the_number_of_layers(zero: str) -> None:
    few, many = (
        counts(MODEL._replace(layers=layers), Spread(dp=8, zero=zero)) for layers in (2, 10)
    )
    for state in STATES:
        assert few[state]["collectives"] == many[state]["collectives"] > 0
        assert 3 < many[state]["bytes"] / few[state]["bytes"] < 5  # but for embeddings


def test_rows_are_never_cut_and_copies_are_one_group_more() -> None:
    matrices = 2 + 2 * 6  # two embeddings; q, k, v, proj, fc1 and fc2
    for zero, groups in (("fsdp", 1), ("hsdp2", 2)):
        few, many = (counts(MODEL, Spread(dp=dp, zero=zero)) for dp in (8, 1024))
        assert few["certified"]["collectives"] == groups
        assert few["certified"]["bytes"] == groups * matrices * 16
        for state in STATES:
            assert few[state]["bytes"] == many[state]["bytes"]
