"""PEFT's adapters train under DeepSpeed from JSON, on two processes as on one, with no word on
embeddings and head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

from tests.engines.deepspeed import peft_net

CASES = [pytest.param(case, id=case["name"]) for case in peft_net.CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case runs in one launch: starting costs more than training."""
    folder = tmp_path_factory.mktemp("peft")
    run_ranks(
        "huggingface", Path(__file__).with_name("peft_worker.py"), peft_net.WORLD, str(folder)
    )
    return folder


@pytest.fixture
def result(runs: Path, case: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(runs / f"{case['name']}.pt", weights_only=False)
    assert "error" not in loaded, loaded["error"]
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_on_two_ranks_follows_one_process(
    result: dict[str, Any], case: dict[str, Any]
) -> None:
    expected, stats = peft_net.one_process(case)
    assert set(result["weights"]) == set(expected)
    for name, weight in result["weights"].items():
        # Sums are made in another order, and Adam divides by √V.
        assert float((weight - expected[name]).norm() / expected[name].norm()) < 1e-4, name
    first, second = result["stats"]
    assert first == second and set(first) == set(stats)
    for name, entry in first.items():
        assert entry[2] == pytest.approx(stats[name].lr, rel=1e-3) and entry[4] == stats[name].tau
    assert bool(stats) == (case["method"] != "VeRA")  # which has vectors alone


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_learns_and_its_zeros_move(result: dict[str, Any], case: dict[str, Any]) -> None:
    start = peft_net.trained(peft_net.make(case["method"]))
    moved = {
        name: float((weight - start[name]).detach().norm())
        for name, weight in result["weights"].items()
    }
    assert min(moved.values()) > 1e-3, moved
    zeros = [name for name, param in start.items() if not param.any()]
    assert zeros or case["method"] == "prompt"


@pytest.mark.parametrize("case", [p for p in CASES if p.values[0]["tau"] in ("balanced", "auto")])
def test_what_is_trained_shares_the_budget(result: dict[str, Any], case: dict[str, Any]) -> None:
    """No adapter is an embedding or head; a head that is trained in full and a prompt are."""
    taus = {name: entry[4] for name, entry in result["stats"][0].items()}
    io = {name for name, tau in taus.items() if tau == 0.1}
    assert io == {name for name in taus if "lm_head" in name or "prompt_encoder" in name}
    hidden = [tau for name, tau in taus.items() if name not in io]
    assert all(tau == pytest.approx(0.144 / len(hidden)) for tau in hidden)
