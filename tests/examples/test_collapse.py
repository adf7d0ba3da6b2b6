"""Both collapses of attention are reproduced by the example, at the numbers that its docstring
promises.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.collapse.__main__ import RUNS, Story, train
from weyl_megatron.report.runs import read_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collapse")


@pytest.fixture(scope="module")
def stories(folder: Path) -> dict[str, Story]:
    return {run.name: train(run, folder, seed=0) for run in RUNS}


def test_post_ln_goes_uniform_under_adamw_and_trains_under_adamw2(
    stories: dict[str, Story],
) -> None:
    dead, alive = stories["post-adamw"], stories["post-adamw2"]
    assert dead.loss > 3.0 and dead.last_entropy > 0.99 * dead.uniform and dead.similarity > 0.99
    assert alive.loss < 2.65 and alive.last_entropy < 0.9 * alive.uniform and alive.similarity < 0.5


def test_pre_ln_concentrates_under_adamw_and_trains_under_adamw2(stories: dict[str, Story]) -> None:
    dead, alive = stories["pre-adamw"], stories["pre-adamw2"]
    assert dead.loss > 2.8 and dead.least_entropy < 0.05 and dead.sigma_qk > 60 and dead.sec > 0.99
    assert alive.loss < 2.65 and alive.least_entropy > 1 and alive.sigma_qk < 5 and alive.sec < 0.8


def test_the_run_that_dies_of_concentration_alone_is_warned_of(
    folder: Path, stories: dict[str, Story]
) -> None:
    assert stories
    warned = {run.name: read_run(folder / run.name).warnings for run in RUNS}
    assert [name for name, warnings in warned.items() if warnings] == ["pre-adamw"]
