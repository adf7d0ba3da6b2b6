"""The same numbers where torch's tensor parallelism spreads a model's blocks, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks
from tests.watch.tp_models import ADAMW, CASES, Case
from weyl_megatron.cli import main

WORKER = Path(__file__).parent / "tp_worker.py"

SPREAD = [case for ranks in (2, 3, 4, 8) for case in CASES[ranks]]

#: Float32 sums in another order. One step of Adam apart they are 3e-6 of a norm at most.
CLOSE = 2e-5


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tp")
    for ranks in CASES:
        run_ranks("torch", WORKER, ranks, str(folder))
    return folder


def read(folder: Path, case: str) -> dict[str, float]:
    values: dict[str, float] = json.loads((folder / f"{case}.json").read_text())
    return values


@pytest.mark.parametrize("case", SPREAD, ids=str)
def test_the_numbers_are_those_of_one_process(case: Case, measured: Path) -> None:
    expected = read(measured, f"whole {case.model}-adamw2")
    values = read(measured, f"{case.name}-adamw2")
    assert values.keys() == expected.keys() and len(expected) > 150
    for tag in ("sigma_qk", "sigma_ov", "sigma_21", "head/2/entropy", "head/2/sec", "grad_x"):
        assert expected[f"block/1/{tag}"] > 0
    # Two steps before it, on float32 sums in another order: 2e-6 at most.
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", [case for case in SPREAD if case.name in ADAMW], ids=str)
def test_adamw_tells_the_gradient_norms_of_one_process(case: Case, measured: Path) -> None:
    expected = read(measured, f"whole {case.model}-adamw")
    values = read(measured, f"{case.name}-adamw")
    tags = [f"block/{number}/grad_{role}" for number in (0, 1) for role in "qkv"]
    assert values.keys() == expected.keys() and expected.keys() >= set(tags)
    assert {tag: values[tag] for tag in tags} == pytest.approx(
        {tag: expected[tag] for tag in tags}, rel=CLOSE
    )


def lines(folder: Path, case: str) -> list[dict[str, Any]]:
    text = (folder / f"{case}-adamw2" / "stability.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("case", ["usual", "behind gather", "mlp alone", "stacked", "fsdp usual"])
def test_every_map_is_written_once(case: str, measured: Path) -> None:
    whole = lines(measured, f"whole {'stacked' if case == 'stacked' else 'plain'}")
    expected, written = (
        sorted((x["step"], x["block"], x["head"]) for x in each if x.get("event") == "map")
        for each in (whole, lines(measured, case))
    )
    assert written == expected and len(expected) == 12  # of 3 steps, 2 blocks and heads 0 and 3


def test_the_header_has_the_heads_of_the_model_or_says_nothing(measured: Path) -> None:
    heads = {case: lines(measured, case)[0]["heads"] for case in ("usual", "shared", "llama")}
    assert heads == {"usual": None, "shared": 4, "llama": 4}  # the first has no head_dim


SENTENCES = {
    "values by rows": "W_q, W_k and W_v of blocks.0 got rows, all and rows on each rank",
    "parts of heads": "got 12 rows of W_q and 3 of W_k on this rank, it takes whole heads of 6",
    "stack of rank": "an attention of 2 heads on each rank, it takes one of all 4: ColwiseParallel",
    "by columns": "W_q, W_k and W_v of blocks.0 got rows, columns and rows on each rank",
    "by hand": "an attention that was not seen and has no head_dim",
    "two meshes": "got the placements (Replicate(), Shard(dim=0)) on a mesh of shape (1, 2)",
    "ddp": "got DDP over tensor parallelism",
    "part of ranks": "on a mesh of shape (2,), it takes those of FSDP2, HSDP, tensor",
}


def test_what_is_no_whole_head_of_any_rank_is_refused_in_a_sentence(measured: Path) -> None:
    refused = {
        case: sentence
        for ranks in (2, 4)
        for case, sentence in json.loads((measured / f"said{ranks}.txt").read_text()).items()
    }
    assert refused.keys() == SENTENCES.keys()
    for case, sentence in refused.items():
        assert sentence.startswith("watch: ") and sentence.endswith("."), (case, sentence)
        assert SENTENCES[case] in sentence, (case, sentence)


def test_the_report_is_that_of_any_run(measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    runs = [str(measured / f"{case}-adamw2") for case in ("usual", "sequence", "fsdp usual")]
    assert main(["report", *runs, "--out", str(page)]) == 0
    assert all(run in page.read_text() for run in ("sequence", "fsdp usual"))
