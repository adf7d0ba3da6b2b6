from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, faults, look
from tests.demo.synthetic import SHAPE, STEPS, synthetic_results
from tests.report.logs import Page, parsed
from weyl_megatron.demo.model import GPT
from weyl_megatron.demo.recipe import RUNS
from weyl_megatron.demo.report import KINDS, write_report
from weyl_megatron.report.charts import smooth
from weyl_megatron.report.run import matrix_place


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("demo")
    write_report(synthetic_results(out), out / "report.html")
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return parsed(html)


def test_it_is_self_contained(html: str, page: Page) -> None:
    assert not re.search(r"https?://|@import|url\(", html)
    assert not [
        name for name, _ in page.attributes if name in {"src", "href", "srcset", "xlink:href"}
    ]


def test_every_run_has_its_numbers_and_its_curves(page: Page) -> None:
    names = [value for name, value in page.attributes if name == "data-name"]
    for run, loss in zip(RUNS, ["3.150", "2.350", "2.410", "2.330", "2.270"], strict=True):
        assert run.title in page.text and loss in page.text
        # The loss twice, smooth and faint, and the entropy of two layers.
        assert names.count(run.title) == 2 + 2


def test_every_matrix_has_its_rate_in_both_runs(page: Page) -> None:
    names = [value for name, value in page.attributes if name == "data-name"]
    assert names.count("layer 1") == names.count("layer 2") == 2 * 6
    assert names.count("α") == 2 * 3 and names.count("schedule") == 2 * 9


def test_the_change_is_the_optimizer_alone(html: str) -> None:
    removed = re.findall(r"<del>- +(.*?)</del>", html)
    added = re.findall(r"<ins>\+ +(.*?)</ins>", html)
    assert removed == ['"type": "AdamW",']
    assert added == ['"type": "AdamW2",', '"tau": "balanced",']


def test_a_claim_that_fails_is_the_headline(tmp_path: Path) -> None:
    write_report(synthetic_results(tmp_path, adamw2=2.9), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A claim is not met" in text and '<li class="unmet">' in text


def test_a_run_that_diverged_is_still_drawn(tmp_path: Path) -> None:
    write_report(synthetic_results(tmp_path, adamw=float("nan")), tmp_path / "report.html")
    points = re.findall(r'points="([^"]*)"', (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert points and not any("nan" in point for point in points)


def test_names_of_matrices() -> None:
    assert matrix_place("h.3.attn.q.weight") == ("attn.q", 3)
    assert matrix_place("h.0.mlp.proj.weight") == ("mlp.proj", 0)
    assert matrix_place("lm_head.weight") == ("lm_head", None)
    matrices = [name for name, weight in GPT(SHAPE).named_parameters() if weight.ndim == 2]
    assert {matrix_place(name)[0] for name in matrices} == set(KINDS)


def test_smoothing_keeps_constants_and_lengths() -> None:
    assert smooth([2.0] * STEPS, 3) == pytest.approx([2.0] * STEPS)
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("is_dark", [False, True])
def test_all_of_it_is_legible_on_a_phone_and_in_a_window(
    html: str, tmp_path: Path, is_dark: bool
) -> None:
    assert [faults(seen) for seen in look(html, tmp_path, is_dark)] == [{}, {}]
