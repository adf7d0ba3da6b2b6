"""The pictures of docs/why_sigma.md: short runs show what the page says, and are drawn."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples.pictures import ENTROPY, FROM_ZERO, RANK, TAU, Panel, Story, picture, train
from tests.processes import ROOT
from weyl_megatron.report.charts import Axis

STEPS = 5


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return [train(setting, STEPS, seed=0) for setting in RANK[:2]]


def test_adamw_s_first_step_moves_a_matrix_further_than_rule_1_allows(
    stories: list[Story],
) -> None:
    adamw, paper = stories
    assert adamw.at("moved", 0) > 5 * TAU
    assert paper.at("moved", 0) == pytest.approx(TAU, rel=0.05)  # and weight decay, 3 % of τ


def test_a_matrix_of_zeros_stays_without_a_floor_and_moves_with_one() -> None:
    without, floor = (train(setting, STEPS, seed=0) for setting in FROM_ZERO[1:3])
    assert without.at("sigma_2") == 0.0 < floor.at("sigma_2")


def test_w_q_w_k_grows_within_a_few_steps_at_a_rate_of_a_tenth() -> None:
    story = train(ENTROPY[0], STEPS, seed=0)
    assert story.at("sigma_qk") > 10 * story.at("sigma_qk", 0)
    assert story.at("entropy") < 0.2 * story.at("entropy", 0)


def test_a_picture_has_a_curve_a_run_in_every_chart(stories: list[Story]) -> None:
    loss, moved = (Panel(stories, name, Axis(name, 1e-3, 9)) for name in ("loss", "moved"))
    svg = picture([loss, moved])
    ElementTree.fromstring(svg)
    names = re.findall(r'<polyline data-name="([^"]+)" points="([^"]*)"', svg)
    assert [name for name, _ in names] == 2 * [story.setting.title for story in stories]
    assert all(len(points.split()) == STEPS for _, points in names)


def test_a_loss_that_is_not_finite_is_a_gap(stories: list[Story]) -> None:
    story = Story(replace(stories[0].setting))
    for step, value in enumerate((3.0, math.nan, 2.0), 1):
        story.add("loss", step, value)
    svg = picture([Panel([story], "loss", Axis("loss", 0, 4))])
    (points,) = re.findall(r'<polyline data-name="[^"]+" points="([^"]*)"', svg)
    assert len(points.split()) == 2


@pytest.mark.parametrize("name", ["updates", "rank", "entropy", "zero"])
def test_the_page_shows_every_picture(name: str) -> None:
    path = ROOT / "docs" / f"why-{name}.svg"
    ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert f"](why-{name}.svg)](why-{name}.svg)" in (ROOT / "docs/why_sigma.md").read_text("utf-8")


def test_the_pictures_are_of_the_runs_that_the_module_names() -> None:
    titles = {setting.title for setting in (*RANK, *ENTROPY, *FROM_ZERO)}
    drawn = "".join(path.read_text("utf-8") for path in Path(ROOT / "docs").glob("why-*.svg"))
    assert set(re.findall(r'data-name="([^"]+)"', drawn)) == titles
