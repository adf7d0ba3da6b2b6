from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.demo.synthetic import UNIGRAM, synthetic_results
from weyl_megatron.demo.launch import verdict
from weyl_megatron.demo.recipe import RUNS
from weyl_megatron.demo.results import claims, load_results, summary, table


def holds(out: Path, **losses: float) -> list[bool]:
    return [claim.holds for claim in claims(synthetic_results(out, **losses))]


def test_all_claims_hold(tmp_path: Path) -> None:
    assert holds(tmp_path) == [True, True, True]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"adamw": UNIGRAM - 0.001}, [False, True, True]),
        ({"adamw": float("nan")}, [True, True, True]),
        ({"adamw2": 2.46}, [True, False, True]),
        ({"adamw2": float("nan")}, [True, False, True]),
        ({"adamw2_auto": 2.351}, [True, True, False]),
        ({"adamw_warmup": 3.2, "adamw2": 3.2, "adamw2_auto": 3.2}, [True, False, False]),
    ],
)
def test_a_claim_that_is_not_met(
    tmp_path: Path, losses: dict[str, float], expected: list[bool]
) -> None:
    assert holds(tmp_path, **losses) == expected


def test_the_exit_status_and_one_sentence_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(synthetic_results(tmp_path), tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert verdict(synthetic_results(tmp_path, adamw2=2.5), tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2.500 against 2.350" in error


def test_the_summary_is_json_with_every_run(tmp_path: Path) -> None:
    written = json.loads(
        json.dumps(summary(synthetic_results(tmp_path, adamw=float("nan"))), allow_nan=False)
    )
    assert list(written["runs"]) == [run.name for run in RUNS]
    assert written["runs"]["adamw"]["validation_loss"] is None
    assert written["runs"]["adamw2"]["clipped_share"] == pytest.approx(1 / 15)
    assert [claim["holds"] for claim in written["claims"]] == [True, True, True]


def test_the_table_is_aligned(tmp_path: Path) -> None:
    lines = table(synthetic_results(tmp_path)).splitlines()
    column = lines[0].index("validation loss") + len("validation loss")
    assert [line[column - 5 : column] for line in lines[2:6]] == [
        "3.150",
        "2.350",
        "2.410",
        "2.330",
    ]
    assert "−0.020" in lines[5] and lines[-1].split()[-1] == f"{UNIGRAM:.3f}"


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    synthetic_results(tmp_path)
    log = tmp_path / "adamw2" / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(
        RuntimeError, match=r"adamw2/log\.jsonl takes an 'end' record as its last, got 'step'"
    ):
        load_results(tmp_path)
