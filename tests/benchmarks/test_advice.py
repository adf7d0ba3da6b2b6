"""benchmarks.advice: a run of the comparison is watched, advised on, and held to the best."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.advice import BALANCED, NEAR, Judged, judge, rows, summary, watch_run
from examples.compare.train import Run

#: Of the cells that the rules were chosen on: AdamW whose tokens became all alike.
RUN = Run("gpt", 6, "post", "adamw", 1e-2, 0, 0.95, 200, 0.0)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return judge(RUN, tmp_path_factory.mktemp("advice"))


def test_the_advice_for_a_collapsed_run_is_what_ended_best(judged: Judged) -> None:
    """docs/compare.md: AdamW 3.192, balanced at this rate 2.488, the best of the cell."""
    assert (judged.advised.method, judged.advised.lr) == (BALANCED, 1e-2)
    assert judged.own == pytest.approx(3.192 - 2.488, abs=1e-3)
    assert judged.regret == 0.0 == judged.same_rate == judged.constant and judged.is_right


def test_a_regret_above_the_margin_is_not_right(judged: Judged) -> None:
    assert judged._replace(regret=NEAR["loss"]).is_right
    assert not judged._replace(regret=NEAR["loss"] + 1e-6).is_right


def test_the_tables_have_a_line_a_run_and_a_kind_of_model(judged: Judged) -> None:
    wrong = judged._replace(regret=0.1)
    assert list(rows([judged, wrong]))[2:] == [
        "| gpt post-LN, 6 layers | AdamW | 0.01 | 0.703 | balanced | 0.01 | 0.000 | yes |",
        "| gpt post-LN, 6 layers | AdamW | 0.01 | 0.703 | balanced | 0.01 | 0.100 | no |",
    ]
    assert list(summary([judged, wrong]))[3:] == [
        "| gpt post-LN, 6 layers, loss | 1 of 2 | 0.050 (0.100) | 0.703 | 0.000 | 0.000 |",
        "| gpt, all, loss | 1 of 2 | 0.050 (0.100) | 0.703 | 0.000 | 0.000 |",
    ]


def test_a_run_that_was_watched_is_not_trained_again(tmp_path: Path) -> None:
    folder = tmp_path / "gpt-L6-post-adamw-0.01-b0.95-s0"
    folder.mkdir()
    (folder / "done").touch()
    assert watch_run(RUN, tmp_path) == folder
    assert not (folder / "stability.jsonl").exists()
