"""What the comparison's page says: noise, projected AdamW² beside the others, widths."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from examples.compare import beside, results, widths
from examples.compare.__main__ import main
from examples.compare.cells import comparisons
from examples.compare.ladder import CONTENDERS, RATES, RUNGS, Rung, climb
from examples.compare.methods import TUNING_SEED, WARMUPS
from examples.compare.noise import QUANTILES, difference
from examples.compare.train import Run, train
from tests.examples.compared import RUN, synthetic, write

GPT = Run("gpt", 6, "pre", "muon", 1e-2, 0, 0.95, 200, 0.0)


def of_seeds(run: Run, *losses: float | None) -> list[dict[str, Any]]:
    return [synthetic(replace(run, seed=seed), loss) for seed, loss in enumerate(losses)]


def test_noise_is_what_a_paired_t_test_does_not_tell_apart() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count, quantile in enumerate(QUANTILES, start=2):
        assert quantile == pytest.approx(stats.t.ppf(0.975, count - 1), abs=1e-3)
    for first, second in (
        ([2.40, 2.42, 2.41], [2.44, 2.465, 2.45]),
        ([2.40, 2.42, 2.41], [2.44, 2.41, 2.45]),
        ([1.0, 1.1], [1.2, 1.31]),
        ([1.0, 1.1, 1.2, 1.05], [1.02, 1.11, 1.25, 1.06]),
    ):
        apart = difference(dict(enumerate(first)), dict(enumerate(second)))
        assert apart.is_noise == (stats.ttest_rel(first, second).pvalue >= 0.05)
        assert apart.mean == pytest.approx(sum(first) / len(first) - sum(second) / len(second))


def test_of_one_seed_and_of_none_nothing_is_called_noise() -> None:
    lone = difference({0: 2.5, 1: 2.4}, {0: 2.4, 2: 2.3})
    assert lone.text == "+0.100" and not lone.is_noise
    assert math.isnan(difference({0: 2.5}, {1: 2.4}).mean)
    assert difference({0: 2.5, 1: 2.4}, {0: 2.5, 1: 2.4}).text == "+0.000 ± 0.000, noise"


def test_what_is_within_noise_of_the_best_is_marked() -> None:
    made = [
        *of_seeds(GPT, 2.40, 2.42, 2.41),
        *of_seeds(replace(GPT, method="adamw2-project"), 2.43, 2.40, 2.45),
        *of_seeds(replace(GPT, method="adamw2-auto"), 2.50, 2.52, 2.52),
        *of_seeds(replace(GPT, method="adamw"), 2.50, None, 2.52),
    ]
    (comparison,) = comparisons(made)
    texts = {name: comparison.mark(entry) for (name, _), entry in comparison.entries.items()}
    assert texts == {
        "muon": "**2.410 ± 0.006**",
        "adamw2-project": "≈ 2.427 ± 0.015",
        "adamw2-auto": "2.513 ± 0.007",
        "adamw": "1 of 3 diverged",
    }


def test_the_page_says_how_projected_adamw2_came_out_whichever_way() -> None:
    projected = replace(GPT, method="adamw2-project")
    vit = replace(GPT, task="vit")
    made = [
        *of_seeds(GPT, 2.40, 2.42, 2.41),
        *of_seeds(projected, 2.43, 2.45, 2.44),
        *of_seeds(replace(GPT, norm="post"), 2.40, 2.42, 2.41),
        *of_seeds(replace(projected, norm="post"), 2.41, 2.43, 2.425),
        *of_seeds(replace(GPT, depth=12), 2.40, 2.42, 2.41),
        *of_seeds(replace(projected, depth=12), 2.41, 2.40, 2.425),
        *of_seeds(vit, 1.0, 1.1, 1.2),
        *of_seeds(replace(vit, method="adamw2-project"), 0.5, 0.6, 0.71),
    ]
    text = "\n\n".join(beside.section(comparisons(made)))
    assert (
        "AdamW², τ = balanced, projected, against Muon: of 4 cells better in 1 (ViT pre 6, β₂ "
        "0.95), within noise in 1 (GPT pre 12, β₂ 0.95), worse in 2 (GPT post 6, β₂ 0.95; GPT pre "
        "6, β₂ 0.95)." in text
    )
    assert "it ends +0.030 from Muon and trains at 1 rates, Muon at 1: not met." in text
    assert "it ends +0.012 from Muon and trains at 1 rates, Muon at 1: met." in text
    assert "| +0.030 ± 0.000 | 0 / 1 / 1 |" in text
    assert "| +0.002 ± 0.011, noise | 0 / 1 / 1 |" in text
    assert "was run: of 4 cells AdamW², τ = balanced, projected in 4; AdamW², τ = bal" in text
    assert beside.section(comparisons(of_seeds(GPT, 2.4))) == []
    partial = [*of_seeds(GPT, 2.40, 2.42), *of_seeds(projected, 2.43)]
    assert beside.section(comparisons(partial)) == []


def test_a_rival_that_diverged_is_worse() -> None:
    made = [*of_seeds(GPT, None, 2.4), *of_seeds(replace(GPT, method="adamw2-project"), 2.5, 2.5)]
    text = "\n\n".join(beside.section(comparisons(made)))
    assert "against Muon: of 1 cells better in 1" in text and "| diverged | diverged |" in text


def test_a_line_without_width_and_batch_is_what_it_was() -> None:
    old = synthetic(RUN, 2.0)
    del old["width"], old["batch"]
    assert results.run_of(old) == RUN
    assert (RUN.width, RUN.batch) == (64, 0)
    with pytest.raises(KeyError):
        results.run_of({key: value for key, value in old.items() if key != "steps"})


def test_a_wider_model_and_larger_batches_train() -> None:
    run = Run("gpt", 1, "pre", "adamw2-project", 1e-2, 0, 0.95, 3, 0.0, width=16, batch=2)
    losses = {
        train(each)["loss"]
        for each in (run, replace(run, width=32), replace(run, batch=3), replace(run, batch=0))
    }
    assert len(losses) == 4
    assert train(replace(run, batch=0))["loss"] == train(replace(run, batch=8))["loss"]
    assert train(replace(RUN, width=16, batch=2))["width"] == 16


def test_the_ladder_is_climbed_resumed_and_takes_what_was_best_below(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rungs = {
        8: Rung(norms=("pre",), seeds=(0,), steps=2),
        16: Rung(norms=("pre",), seeds=(0, 1), steps=3, batch=2, chosen_at=8),
    }
    methods = ("warmup", "adamw2-project")
    with pytest.raises(ValueError, match="got 16, whose rates are those that are best at 8; it"):
        climb(rungs, [16], methods, tmp_path, 1, depth=1)
    climb(rungs, [16, 8], methods, tmp_path, 1, depth=1)
    whole = (tmp_path / results.FILE).read_text()
    made = [results.run_of(json.loads(line)) for line in whole.splitlines()]
    below, above = ([run for run in made if run.width == width] for width in (8, 16))
    assert len(below) == len(RATES) * (len(WARMUPS) + 1 + 1)
    done = results.read(tmp_path)
    for method in methods:
        reported = [run for run in below if run.method == method and run.seed != TUNING_SEED]
        best = min(reported, key=lambda run: done[run]["loss"])
        chosen = replace(best, width=16, steps=3, batch=2)
        assert [run for run in above if run.method == method] == [
            replace(chosen, seed=seed) for seed in (0, 1)
        ]
    capfd.readouterr()
    climb(rungs, [16, 8], methods, tmp_path, 1, depth=1)
    assert (tmp_path / results.FILE).read_text() == whole
    assert capfd.readouterr().out == (
        f"0 runs to make, {len(below)} are there\n0 runs to make, {len(above)} are there\n"
    )


def the_ladder() -> list[dict[str, Any]]:
    """A whole ladder but for Muon's and one of projected AdamW²'s runs at its top."""
    levels = {"warmup": 0.2, "adamw2-auto": 0.1, "adamw2-project": 0.03, "muon": 0.0}
    made = []
    for (width, rung), (name, level) in product(RUNGS.items(), levels.items()):
        for norm in rung.norms:
            for lr in RATES[:1] if rung.chosen_at else RATES:
                run = Run("gpt", 6, norm, name, lr, 0, 0.95, rung.steps, 0.0, width, rung.batch)
                bend = (0.0, 0.001, -0.003) if name != "muon" else (0.0, 0.0, 0.0)
                losses = [2.4 + level - width / 1000 + bend[seed] for seed in rung.seeds]
                made += of_seeds(run, *losses)
    return [
        each
        for each in made
        if each["width"] != 256
        or each["method"] not in ("muon", "adamw2-project")
        or (each["method"] == "adamw2-project" and each["seed"] == 0)
    ]


def test_the_page_shows_the_ladder_and_what_is_missing(tmp_path: Path) -> None:
    made = the_ladder()
    write(tmp_path, made)
    assert main(["table", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    head = (
        "| loss | pre-LN, width 64 | pre-LN, width 128 | pre-LN, width 256 | post-LN, width 64 | "
        "post-LN, width 128 |"
    )
    assert head in text
    assert "| Muon | **2.336 ± 0.000** at 0.001 | **2.272 ± 0.000** at 0.001 |  |" in text
    order = "Muon < AdamW², τ = balanced, projected < AdamW², τ = balanced < AdamW, tuned warmup"
    assert f"- pre-LN, width 128: {order}\n" in text
    gaps = "+0.029 ± 0.001 at width 64; +0.029 ± 0.001 at width 128"
    assert f"- pre-LN, AdamW², τ = balanced, projected: {gaps}\n" in text
    missing = "- pre-LN, width 256: AdamW², τ = balanced, projected; Muon\n"
    assert f"Not whole yet, and not shown:\n\n{missing}" in text
    assert "1,000 steps of 2,048 tokens, 2 seeds, at the rate" in text
    # The grid's own tables and picture are of width 64.
    assert "| GPT, β₂ 0.95 | post-LN, 6 layers | pre-LN, 6 layers |" in text
    assert (tmp_path / "compare.svg").read_text().count('class="chart"') == 2
    assert (tmp_path / widths.PICTURE).read_text().count('class="chart"') == 2
    assert "### GPT, pre-LN, 6 layers, width 256, β₂ 0.95, 1000 steps" in text


def test_the_picture_of_widths_is_of_what_is_above_muon(tmp_path: Path) -> None:
    write(tmp_path, [each for each in the_ladder() if each["width"] < 256])
    assert main(["table", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    picture = (tmp_path / widths.PICTURE).read_text()
    for width in (64, 128):
        assert f">{width}</text>" in picture
    assert "loss above Muon's, nats" in picture.replace("&#x27;", "'")
    # In each of two charts a curve and a band for each of the methods.
    assert picture.count("<polyline") == len(CONTENDERS) * 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--widths", "96"], "compare: --widths got 96, it takes 64, 128, 256."),
        (["--rate", "0"], "compare: --rate got 0.0, it takes a number above 0."),
        (["--procs", "0"], "compare: --procs got 0, it takes a whole number from 1 on."),
        (
            ["--widths", "256", "--methods", "muon"],
            "compare: --widths got 256, whose rates are those that are best at 128; it takes all "
            "runs of muon there first.",
        ),
    ],
)
def test_an_impossible_ladder_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ladder", *arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == sentence + "\n"
    assert not list(tmp_path.iterdir())
