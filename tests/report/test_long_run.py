"""The page of a run of several hours: its size, how soon it is open, and that no extreme is lost.

`python -m benchmarks.long_run` measures the same of 1,000 measurements, and the memory.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.long_run import LongRun, watched
from tests.browser import CHROMIUM
from tests.devtools import tab
from weyl_megatron.report.curves import HEADS
from weyl_megatron.report.report import write_report
from weyl_megatron.report.series import BUCKETS

#: Seconds that the page's thread may compute until it is open, three times what it took: neighbours
#: on the two cores do not slow it, so that this is what a larger page or a slower script breaks.
BUSY = 1.0

#: Seconds until it is open, ten times the 3 that it shall take where nothing else runs: it took .7
#: beside a load of 11 on two cores, 7 beside one of 17.
OPEN = 30.0

#: Twice as many measurements as are kept, but one: each bucket has two of them.
SHORT = LongRun(steps=100 * (2 * BUCKETS - 2), layers=3, heads=HEADS // 3 + 1, maps=1)

#: As many measurements as are kept: no log of such a model makes a larger page.
LARGEST = LongRun(steps=100 * (BUCKETS - 1))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SHORT, id="3 blocks"),
        pytest.param(LARGEST, id="48 blocks", marks=pytest.mark.slow),
    ],
)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LongRun, Path]:
    folder = tmp_path_factory.mktemp("long")
    request.param.write(folder / "run")
    assert write_report([folder / "run"], folder / "report.html") == []
    (folder / "run" / "stability.jsonl").unlink()
    return request.param, folder / "report.html"


def panel(html: str, name: str) -> str:
    return html[html.index(f'data-panel="{name}"') :].split("</section>")[0]


def drawn(chart: str) -> Iterator[tuple[float, float]]:
    """The steps and the numbers of all points of a chart, as far as pixels tell them."""
    left, right, top, base = map(float, re.findall(r'data-box="([^"]*)"', chart)[0].split(","))
    low, high, scale = re.findall(r'data-y="([^"]*)"', chart)[0].split(",")
    last = float(re.findall(r'data-x="0,([^"]*)"', chart)[0])
    for points in re.findall(r'<poly(?:line|gon)[^>]*points="([^"]*)"', chart):
        for x, y in (map(float, pair.split(",")) for pair in points.split()):
            share = (base - y) / (base - top)
            span = float(high) / float(low) if scale == "log" else float(high) - float(low)
            value = float(low) * span**share if scale == "log" else float(low) + share * span
            yield (x - left) / (right - left) * last, value


def test_the_page_is_of_ten_megabytes_at_most(made: tuple[LongRun, Path]) -> None:
    run, page = made
    size = page.stat().st_size
    assert size < 10e6 and (run is SHORT or size > 4e6)


def test_every_extreme_is_on_the_page_at_its_step(made: tuple[LongRun, Path]) -> None:
    run, page = made
    html, last = page.read_text(encoding="utf-8"), run.layers - 1
    for name, title, tag in (
        ("loss", "", "loss"),
        ("terms", "‖x‖", f"block/{last}/x"),
        ("logits", "largest logit", f"block/{last // 2}/head/{run.heads - 1}/max_logit"),
        ("rates", "attn.q", f"clip/blocks.{last}.attn.q.weight/lr"),
    ):
        step, value = run.planted()[tag]
        charts = panel(html, name).split("<svg class")[1:]
        (chart,) = (each for each in charts if f'y="13">{title}</text>' in each)
        near = [point for point in drawn(chart) if point[1] == pytest.approx(value, rel=0.02)]
        # A logit is drawn in the middle of its bucket, and a pixel stands for some steps.
        room = 2 * run.every + run.steps / 250
        assert near, (name, value)
        assert min(abs(at - step) for at, _ in near) <= room, (name, step, near)


def test_the_lowest_entropy_is_in_the_heat_map(made: tuple[LongRun, Path]) -> None:
    run, page = made
    html = panel(page.read_text(encoding="utf-8"), "entropy")
    step, _ = run.planted()[f"block/{run.layers - 1}/head/0/entropy"]
    steps = [int(at) for at in re.findall(r'data-steps="([^"]*)"', html)[0].split(",")]
    levels = base64.b64decode(re.findall(r'data-levels="([^"]*)"', html)[0])
    rows = [levels[at : at + len(steps)] for at in range(0, len(levels), len(steps))]
    assert len(rows) == run.layers * run.heads
    row = rows[(run.layers - 1) * run.heads]
    # All other entropies are at a tenth of the uniform one at least.
    column = row.index(min(row))
    assert row[column] == 1 and abs(steps[column] - step) <= 2 * run.every
    assert min(min(each) for each in rows if each is not row) > 1


def test_warnings_and_spikes_are_all_there(made: tuple[LongRun, Path]) -> None:
    run, page = made
    html = page.read_text(encoding="utf-8")
    rows = panel(html, "warnings").count("<tr style")
    every = len(run.measured) // 10
    assert rows == len([at for at in range(len(run.measured)) if at % every == 1])
    assert html.count('class="mark"') == rows
    assert panel(html, "spikes").count("<tr style") == 5  # the worst are the last


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_soon_open(made: tuple[LongRun, Path], tmp_path: Path, width: int) -> None:
    with tab(tmp_path / "profile") as shown:
        opened = shown.open(made[1], width)
        assert shown.errors == [] and opened["wide"] <= 0
    assert 0 < opened["loaded"] <= opened["painted"] < OPEN, opened
    assert 0 < opened["busy"] < BUSY, opened


def test_a_page_that_throws_or_is_too_wide_is_found(tmp_path: Path) -> None:
    """The look itself."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    page = tmp_path / "page.html"
    page.write_text("<p style='width:500px'>wide</p><script>nothing()</script>", encoding="utf-8")
    with tab(tmp_path / "profile") as shown:
        opened = shown.open(page, 390)
        assert opened["wide"] > 0 and "nothing is not defined" in " ".join(shown.errors)


def test_the_log_has_the_tags_of_a_real_one(tmp_path: Path) -> None:
    """Of a model of two blocks and two heads each it has all that `Watch` wrote, and no more."""
    log = LongRun(steps=200, layers=2, heads=2).write(tmp_path)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    (written,) = {frozenset(line["values"]) for line in lines if line["event"] == "step"}
    assert written == frozenset(watched())
