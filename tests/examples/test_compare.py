"""The comparison: every method trains, runs are resumed, and the page is made from the raw results
alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from examples.compare import __main__ as compare
from examples.compare import results, vit
from examples.compare.__main__ import grid_of, main, parse
from examples.compare.cells import comparisons
from examples.compare.methods import METHODS, TUNING_SEED, WARMUPS, parameter_groups
from examples.compare.train import TASKS, schedule, train
from tests.examples.compared import RUN, synthetic, write

TINY = [
    "--task",
    "vit",
    "--depths",
    "1",
    "--norm",
    "post",
    "--lrs",
    "3e-3",
    "--seeds",
    "0",
    "--beta2",
    "0.95",
]
TINY += ["--steps", "2", "--procs", "1"]


def a_grid(out: Path) -> list[dict[str, Any]]:
    """Results of the grid's shape: AdamW diverges at the largest rate, AdamW² is .05 above the
    warmup elsewhere.
    """
    grid = grid_of(parse(["--depths", "6", "12", "--beta2", "0.95"]))
    runs = [run for run in grid.first() if run.seed != TUNING_SEED] + [
        replace(run, warmup=0.2) for run in grid.tuned()
    ]
    levels = {"warmup": 2.4, "adamw2": 2.45}
    losses = [levels.get(run.method, 2.6) + 0.01 * run.seed for run in runs]
    made = [
        synthetic(run, None if run.method == "adamw" and run.lr > 0.02 and run.seed == 1 else loss)
        for run, loss in zip(runs, losses, strict=True)
    ]
    write(out, made)
    return made


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, task: str) -> None:
    for norm in ("pre", "post"):
        result = train(
            replace(RUN, task=task, method=method, norm=norm, warmup=METHODS[method].warmup or 0.0)
        )
        assert (
            math.isfinite(result["loss"])
            and 0 <= result["accuracy"] <= 1
            and not result["diverged"]
        )


@pytest.mark.parametrize("tau", ["0.01", "balanced"])
def test_projected_methods_clip_the_singular_values_of_hidden_matrices_alone(tau: str) -> None:
    (name,) = [
        name for name, each in METHODS.items() if each.title == f"AdamW², τ = {tau}, projected"
    ]
    torch.manual_seed(0)
    model = TASKS["vit"].model(2, "pre")
    (optimizer,) = METHODS[name].optimizers(model, 3e-2, 0.95)
    model(*next(TASKS["vit"].batches(1, 0))).backward()
    optimizer.step()
    stats = optimizer.stats()
    clipped = {name for name, each in stats.items() if each.directions}
    assert clipped == {name for name in stats if name.startswith("blocks.")} and len(clipped) == 12


def test_a_run_repeats() -> None:
    first, again = train(RUN), train(RUN)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert train(replace(RUN, seed=1))["loss"] != first["loss"]


def test_a_run_that_blows_up_has_diverged() -> None:
    result = train(replace(RUN, lr=1e30, steps=8))
    assert result["diverged"] and result["loss"] is None
    assert train(replace(RUN, lr=10.0))["diverged"]


def test_the_vit_learns_the_digits() -> None:
    result = train(replace(RUN, norm="pre", steps=200))
    assert result["accuracy"] > 0.8


def test_the_digits_are_split_and_standardised() -> None:
    (images, classes), (held_out, _) = vit.digits()
    assert len(images) == len(classes) == 1348 and len(held_out) == 449
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)


def test_every_parameter_is_in_one_group() -> None:
    for task in TASKS.values():
        model = task.model(2, "pre")
        hidden, others, vectors = (dict(group["params"]) for group in parameter_groups(model))
        assert {**hidden, **others, **vectors}.keys() == dict(model.named_parameters()).keys()
        assert len(hidden) == 2 * 6 and len(others) == 3 and vectors


def test_the_schedule_warms_up_and_ends_at_a_tenth() -> None:
    assert [schedule(step, 100, 0.05) for step in (0, 4, 5)] == [0.2, 1.0, 1.0]
    assert schedule(0, 100, 0.0) == 1.0 and schedule(99, 100, 0.0) == pytest.approx(0.1, abs=1e-3)


def test_what_is_there_is_skipped_and_half_a_line_made_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, "--methods", "adamw", "warmup", "--out", str(tmp_path)]
    assert main(command) == 0
    whole = (tmp_path / results.FILE).read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    # AdamW, the four that tune, and the one that is reported.
    assert [line["seed"] for line in lines] == [0, *[TUNING_SEED] * len(WARMUPS), 0]
    best = max(lines[1:5], key=lambda line: (line["accuracy"], -line["loss"]))
    assert lines[5]["warmup"] == best["warmup"]
    capfd.readouterr()
    assert main(command) == 0
    assert (tmp_path / results.FILE).read_text() == whole
    assert capfd.readouterr().out == "0 runs to make, 6 are there\n"

    (tmp_path / results.FILE).write_text(whole[:-40])
    assert len(results.read(tmp_path)) == 5
    assert main(command) == 0
    again = [json.loads(line) for line in (tmp_path / results.FILE).read_text().splitlines()]
    assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in lines]


def test_one_process_writes_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with results.writing(tmp_path):
        assert main([*TINY, "--methods", "adamw", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"compare: --out got {tmp_path}, where another process writes; it takes one at a time.\n"
    )


def test_the_page_is_made_from_the_results_alone(tmp_path: Path) -> None:
    made = a_grid(tmp_path / "a")
    write(tmp_path / "b", made[::-1])
    for name in ("a", "a", "b"):
        assert (
            main(["table", "--out", str(tmp_path / name), "--docs", str(tmp_path / f"docs-{name}")])
            == 0
        )
        for page in ("compare.md", "compare.svg"):
            assert (tmp_path / f"docs-{name}" / page).read_bytes() == (
                tmp_path / "docs-a" / page
            ).read_bytes()
    text = (tmp_path / "docs-a/compare.md").read_text()
    assert "| AdamW, tuned warmup | **2.410 ± 0.006** at 0.001 |" in text
    assert "| AdamW², τ = 0.01 | 2.460 ± 0.006 at 0.001 |" in text
    assert "| AdamW², τ = 0.01 | 4 of 4: 0.001, 0.003, 0.01, 0.03 |" in text
    assert "| AdamW | 2.610 ± 0.006 | 2.610 ± 0.006 | 2.610 ± 0.006 | 1 of 3 diverged |" in text
    assert "**2.410 ± 0.006** (20%)" in text
    assert (tmp_path / "docs-a/compare.svg").read_text().count('class="chart"') == 8
    assert "Not whole yet" not in text


def test_a_grid_that_is_not_whole_says_so_and_names_no_winner_without_a_rival(
    tmp_path: Path,
) -> None:
    lone = synthetic(replace(RUN, task="gpt", depth=24, lr=1e-3), 2.5)
    write(tmp_path, [*a_grid(tmp_path / "whole"), lone])
    assert main(["table", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    (cell,) = [comparison.cell for comparison in comparisons([lone])]
    assert f"Not whole yet: {cell.title}." in text
    assert "2.500 at 0.001 |" in text


def test_methods_are_compared_within_a_cell(tmp_path: Path) -> None:
    a_grid(tmp_path)
    found = comparisons(list(results.read(tmp_path).values()))
    assert len(found) == 8
    gpt = found[0]
    assert gpt.best() == pytest.approx(2.41) and gpt.good_rates("adamw") == []
    assert gpt.best_rate("adamw") == 1e-3 and math.isnan(gpt.mean("adamw", 3e-2))


def test_no_rate_is_good_where_nothing_trains(tmp_path: Path) -> None:
    write(tmp_path, [synthetic(replace(RUN, task="gpt", lr=lr), 3.19) for lr in (1e-3, 1e-2)])
    (found,) = comparisons(list(results.read(tmp_path).values()))
    assert found.best() == 3.19 and found.good_rates("adamw") == []


def test_the_command_s_help_counts_the_runs_and_methods() -> None:
    grid = grid_of(parse([]))
    assert f"all of it: {len(grid.first() + grid.tuned())} runs" in compare.__doc__
    assert len(METHODS) == 14 and "fourteen methods" in compare.__doc__


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "sgd"], f"compare: --methods got 'sgd', it takes {', '.join(METHODS)}."),
        (["--task", "rnn"], "compare: --task got 'rnn', it takes gpt, vit."),
        (["--norm", "mid"], "compare: --norm got 'mid', it takes pre, post."),
        (["--depths", "0"], "compare: --depths got 0, it takes whole numbers from 1 on."),
        (["--lrs", "nan"], "compare: --lrs got nan, it takes numbers above 0."),
        (
            ["--seeds", "1000"],
            "compare: --seeds got 1000, it takes whole numbers but 1000, which tunes.",
        ),
        (
            ["--beta2", "1"],
            "compare: --beta2 got 1.0, it takes numbers from 0 up to, but without, 1.",
        ),
        (["--procs", "0"], "compare: --procs got 0, it takes a whole number from 1 on."),
    ],
)
def test_an_impossible_option_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == sentence + "\n"
    assert not list(tmp_path.iterdir())


def test_a_table_of_nothing_and_a_line_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(
        "it takes a folder whose results.jsonl has a finished run.\n"
    )
    (tmp_path / results.FILE).write_text("nonsense\n")
    assert main(["table", "--out", str(tmp_path)]) == 2
    assert "line 1 of" in capsys.readouterr().err
