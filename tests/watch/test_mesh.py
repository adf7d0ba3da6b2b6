"""The same numbers however torch spreads a model over ranks, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_ranks
from weyl_megatron.cli import main

WORKER = Path(__file__).parent / "mesh_worker.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mesh")
    for ranks in (1, 2, 4):
        run_ranks("torch", WORKER, ranks, str(folder))
    return folder


def read(folder: Path, case: str) -> dict[str, float]:
    values: dict[str, float] = json.loads((folder / f"{case}.json").read_text())
    return values


@pytest.mark.parametrize("case", ["fsdp", "root", "checkpointed", "hsdp"])
def test_the_numbers_are_those_of_one_process(case: str, measured: Path) -> None:
    expected, values = read(measured, "whole"), read(measured, case)
    assert values.keys() == expected.keys() and len(expected) > 150
    for tag in ("block/2/sigma_qk", "block/0/head/1/entropy", "block/1/grad_x", "block/1/grad_k"):
        assert expected[tag] > 0
    # Two steps before it, on float32 sums in another order: 4e-7 at most.
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_converted_layers_are_measured_as_they_compute(measured: Path) -> None:
    """σReparam's Ŵ, which is there only while its layer computes."""
    expected, values = read(measured, "whole converted"), read(measured, "converted")
    assert values.keys() == expected.keys()
    # γ after two steps; sums in another order as above.
    assert 0.9 < expected["block/0/sigma_q"] < 1.1
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_weights_of_mixed_precision_are_measured_as_they_compute(measured: Path) -> None:
    expected, values = read(measured, "whole"), read(measured, "bf16")
    assert values.keys() == expected.keys()
    # bf16 has 8 digits of two; gradients after two steps are 0.7 % off.
    assert values == pytest.approx(expected, rel=0.02, abs=1e-4)
    assert values["block/0/sigma_q"] == pytest.approx(expected["block/0/sigma_q"], rel=4e-3)


def said(folder: Path, ranks: int) -> dict[str, str]:
    answers: dict[str, str] = json.loads((folder / f"said{ranks}.txt").read_text())
    return answers


def test_sharpness_of_what_no_rank_has_whole_is_refused_in_a_sentence(measured: Path) -> None:
    refused = said(measured, 2)
    sentence = refused.pop("sharpness beside bands")
    assert "in its graph, of torch's tensor parallelism" in sentence
    assert set(refused) == {"sharpness", "sharpness between", "sharpness of bands"}
    for case, sentence in refused.items():
        assert "is partitioned, it takes whole parameters" in sentence, (case, sentence)


def test_a_mesh_without_some_ranks_is_refused_in_a_sentence(measured: Path) -> None:
    sentence = said(measured, 4)["part of ranks"]
    assert sentence.startswith("watch: parameter '")
    assert "on a mesh of shape (2,), it takes those of FSDP2, HSDP, tensor" in sentence


def test_the_report_is_that_of_any_run(measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    runs = [str(measured / case) for case in ("whole", "fsdp", "hsdp")]
    assert main(["report", *runs, "--out", str(page)]) == 0
    assert all(run in page.read_text() for run in ("fsdp", "hsdp"))
