"""A run under DeepSpeed that was stopped goes on bit for bit as the run that was not, in every way
it is spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks
from tests.selection import quick_and_slow, values_of

pytest.importorskip("deepspeed")

WORKER = Path(__file__).with_name("resume_worker.py")


def cases_of() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [
        {"stage": stage, "dtype": dtype, "offload": offload}
        for stage, dtype, offload in product((0, 1, 2, 3), ("fp32", "bf16"), (False, True))
        if not (stage == 0 and offload)  # DeepSpeed offloads the optimizer from stage 1 on
    ]
    # DeepSpeed gives this combination to BF16_Optimizer instead of its ZeRO-1 optimizer.
    cases.append({"stage": 1, "dtype": "bf16", "grad_dtype": "fp32", "label": "bf16-optimizer"})
    cases.append(
        {"stage": 3, "dtype": "fp32", "zero": {"sub_group_size": 3000}, "label": "sub-groups"}
    )
    cases.append(
        {
            "stage": 2,
            "dtype": "fp32",
            "zero": {"round_robin_gradients": True},
            "label": "round-robin",
        }
    )
    cases += [
        {"stage": stage, "dtype": "fp32", "params": {"clip": "project"}, "label": "project"}
        for stage in (0, 1, 2, 3)
    ]
    for case in cases:
        words = [
            f"z{case['stage']}",
            case["dtype"],
            "offload" if case.get("offload") else "",
            case.get("label", ""),
        ]
        case["name"] = "-".join(filter(None, words))
    return cases


CASES = cases_of()

#: What `make test` runs: each of DeepSpeed's optimizers.
QUICK = {
    "z0-fp32",
    "z1-fp32",
    "z2-bf16",
    "z3-fp32-offload",
    "z1-bf16-bf16-optimizer",
    "z3-fp32-sub-groups",
    "z2-fp32-round-robin",
    "z1-fp32-project",
    "z3-fp32-project",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every case that is tested runs in one launch: starting DeepSpeed costs more than training."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "cases.json").write_text(json.dumps(values_of(request, "case")))
    run_ranks("deepspeed", WORKER, 2, str(folder / "cases.json"), str(folder))
    return folder


@pytest.mark.parametrize("case", quick_and_slow(CASES, QUICK))
def test_a_resumed_run_is_the_uninterrupted_one(
    results: Path, case: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    result = json.loads((results / f"{case['name']}.json").read_text())
    assert "error" not in result, result["error"]
    matrices = result["matrices"]
    record_property(
        "tried",
        f"{case['name']}, 2 ranks: saved after 4 steps, loaded by a new engine, 4 steps more",
    )
    assert matrices["clipped"] and matrices["certified"], matrices
    if case.get("label") == "bf16-optimizer":
        assert result["wrapper"] == "BF16_Optimizer"
    assert result["moved"], "nothing moved after the save: the case shows nothing"
    if case.get("label") == "sub-groups":
        assert result["steppings"] > 2, "there are no sub-groups: the case shows nothing"
    for rank, told in enumerate(result["ranks"]):
        assert told == {"loaded": [], "ended": [], "stats": True, "losses": True}, (
            f"rank {rank}: {told}"
        )
    survived = (
        f"bit for bit: weights, masters, moments, steps ({result['tensors']} tensors a "
        "rank), losses and σ₁; "
    )
    record_property(
        "survived",
        survived + f"{matrices['clipped']} matrices clipped, {matrices['certified']} certified",
    )
