from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.demo.synthetic import SHAPE, STEPS, synthetic_results
from weyl_megatron.demo.model import GPT
from weyl_megatron.demo.recipe import RUNS
from weyl_megatron.demo.report import KINDS, write_report
from weyl_megatron.report.charts import smooth
from weyl_megatron.report.runs import matrix_place

EMPTY = {"meta", "line", "polyline", "polygon", "circle", "path", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that what opens closes, and keeps the attributes and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("demo")
    write_report(synthetic_results(out), out / "report.html")
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    parsed = Page()
    parsed.feed(html)
    parsed.close()
    assert parsed.open == []
    return parsed


def test_it_is_self_contained(html: str, page: Page) -> None:
    assert not re.search(r"https?://|@import|url\(", html)
    assert not [
        name for name, _ in page.attributes if name in {"src", "href", "srcset", "xlink:href"}
    ]


def test_every_run_has_its_numbers_and_its_curves(page: Page) -> None:
    names = [value for name, value in page.attributes if name == "data-name"]
    for run, loss in zip(RUNS, ["3.150", "2.350", "2.410", "2.330"], strict=True):
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
