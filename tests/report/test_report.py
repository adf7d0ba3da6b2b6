"""The page of watched runs, of logs that were never trained."""

from __future__ import annotations

import math
import random
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.report.logs import (
    BLOCKS,
    STEPS,
    TERMS,
    UNIFORM,
    Page,
    attention_map,
    html_of,
    panels,
    parsed,
    start,
    step,
    values,
    warning,
    write_log,
)
from weyl_megatron.report.runs import read_run

PANELS = ["summary", "loss", "rates", "clipped", "projected", "terms", "energy", "logits"]
PANELS += ["entropy", "modes", "maps", "similarity", "gradients", "sharpness", "warnings", "spikes"]


def test_every_panel_is_drawn(html: str) -> None:
    assert panels(html) == PANELS and "data-missing" not in html
    for term in TERMS:
        assert html.count(f'data-term="{term}"') == 2, term
    assert html.count('id="big-') == 2 and html.count("data-cell=") == 2 * 4


def test_it_is_self_contained(html: str, page: Page) -> None:
    assert not re.search(r"https?://|@import|url\(", html)
    assert not [
        name for name, _ in page.attributes if name in {"src", "href", "srcset", "xlink:href"}
    ]


def test_the_summary(html: str) -> None:
    rows = re.findall(r"<tr.*?</tr>", html[: html.index('data-panel="loss"')])[1:]
    collapsed, well = (re.sub(r"(<[^>]+>)+", "|", each).strip("|").split("|") for each in rows)
    numbers = ["3", "step 120", "0.03", "uniform 2.77", "0.91", "block 1, head 0, step 120"]
    modes = ["0", "normal", "0", "benign", "4", "malignant", "0", "uniform"]
    assert collapsed == [
        "AdamW, no warmup",
        *numbers,
        "53",
        "block 0, head 1, step 120",
        *modes,
        "1",
        "first at step 70",
    ]
    assert well[:4] == ["AdamW²", "3", "step 120", "1.94"] and well[-1] == "0"
    assert well[-9:-1] == ["2", "normal", "0", "benign", "0", "malignant", "2", "uniform"]


def test_the_runs_of_a_term_have_one_range_and_every_block_its_curve(html: str) -> None:
    for term in ("sigma_q", "similarity"):
        charts = re.findall(rf'data-term="{term}">(.*?)</figure>', html)
        assert len({re.search(r'data-y="([^"]*)"', chart)[1] for chart in charts}) == 1  # type: ignore[index]
        assert [re.findall(r'data-name="([^"]*)"', chart) for chart in charts] == [
            ["block 0", "block 1"]
        ] * 2


def test_rates_stand_beside_the_schedule(html: str) -> None:
    rates = html[html.index('data-panel="rates"') : html.index('data-panel="clipped"')]
    assert re.findall(r'class="title"[^>]*>([^<]*)<', rates) == ["attn.q", "mlp.fc", "wte"] * 2
    names = re.findall(r'data-name="([^"]*)"', rates)
    assert names.count("schedule") == 6 and names.count("block 1") == 4 and names.count("α") == 2


def test_what_was_projected_is_the_mean_of_a_kind_and_of_a_block(tmp_path: Path) -> None:
    """Of the runs that have it; a number that was not finite is not in the mean."""
    log = [start("scaled"), step(10, **{"clip/h.0.fc.weight/lr": 0.1, "clip_share/fc": 1.0})]
    plain = write_log(tmp_path / "plain", log)
    html = html_of(plain)
    assert "projected" not in panels(html) and 'data-missing="projected"' in html
    log = [start("clipped")]
    for at in (10, 20):
        numbers = {"h.0.fc": at, "h.1.fc": at + 4, "h.1.proj": 2 * at, "head": None}
        tags = {f"clip/{name}.weight/directions": value for name, value in numbers.items()}
        tags |= {f"clip/{name}.weight/unseen": 0.5 for name in numbers}
        log.append(step(at, **tags, **{"clip_share/fc": 1.0, "clip_share/wte": 0.0}))
    html = html_of(plain, write_log(tmp_path / "clipped", log))
    panel = html[html.index('data-panel="projected"') :].split("</section>")[0]
    parsed(f"<section {panel}</section>")
    assert re.findall("<h3>([^<]*)", panel) == ["clipped"]
    charts = panel.split("<svg class")[1:]
    titles = ["directions clipped, by kind", "factor on the unseen part, by kind"]
    titles += [title.replace("kind", "block") for title in titles]
    assert re.findall(r'class="title"[^>]*>([^<]*)<', panel) == titles
    drawn = [drawn_values(chart) for chart in charts]
    assert drawn[0] == {"fc": [12, 22], "proj": [20, 40]}
    assert drawn[2] == {"block 0": [10, 20], "block 1": [17, 32]}
    assert drawn[1] == {name: [0.5, 0.5] for name in ("fc", "proj", "head")}
    # A kind has the colour that it has in the panel of shares.
    shares = html[html.index('data-panel="clipped"') : html.index('data-panel="projected"')]
    (color,) = set(re.findall(r'--run:([^"]*)">fc<', shares + panel))
    assert color in charts[0]


def drawn_values(chart: str) -> dict[str, list[Any]]:
    """The numbers of a chart's curves, by their names, as far as pixels tell them."""
    low, high = map(float, re.findall(r'data-y="([^,]*),([^,]*)', chart)[0])
    top, base = map(float, re.findall(r'data-box="[^,]*,[^,]*,([^,]*),([^"]*)"', chart)[0])
    drawn = {}
    for name, points in re.findall(r'data-name="([^"]*)" points="([^"]*)"', chart):
        heights = (float(point.split(",")[1]) for point in points.split())
        values = [low + (base - y) / (base - top) * (high - low) for y in heights]
        drawn[name] = [pytest.approx(value, abs=0.01 * (high - low)) for value in values]
    return drawn


def test_entropy_is_the_mean_of_a_blocks_heads_at_its_steps(html: str) -> None:
    schedule = re.findall(r'data-name="schedule" points="([^"]*)"', html)[0].split()
    panel = html[html.index('data-panel="entropy"') : html.index('data-panel="modes"')]
    charts = panel.split("<svg class")[1:]
    assert len(charts) == BLOCKS and all("uniform</text>" in chart for chart in charts)
    for chart in charts:
        low, high = map(float, re.findall(r'data-y="([^,]*),([^,]*)', chart)[0])
        top, base = map(float, re.findall(r'data-box="[^,]*,[^,]*,([^,]*),([^"]*)"', chart)[0])
        curves = re.findall(r'<polyline[^>]*points="([^"]*)"', chart)
        for collapses, points in zip((True, False), curves, strict=True):
            places = [tuple(map(float, point.split(","))) for point in points.split()]
            assert [x for x, _ in places] == [float(point.split(",")[0]) for point in schedule]
            drawn = [low + (base - y) / (base - top) * (high - low) for _, y in places]
            logged = [values(at, collapses)["block/0/head/0/entropy"] for at in STEPS]
            assert drawn == pytest.approx(logged, abs=1e-3)
        assert chart.count("<polygon") == 2


def test_titles_texts_and_names_are_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'&"
    log = [
        start(evil, sec=evil),
        step(1, **{"loss": 1.0, f"clip/{evil}/lr": 1.0, f"clip_share/{evil}": 1.0}),
    ]
    log += [step(2, **{"block/0/head/0/sec": 0.5, "block/0/head/0/mode": 1e9})]
    log.append(warning(1, 0, 0, evil))
    html = html_of(write_log(tmp_path / "a", [*log, {"event": evil}]))
    assert "alert(1)" in html and "<script>alert" not in html and html.count("</script>") == 3
    parsed(html)


def test_what_is_not_a_number_is_a_gap(tmp_path: Path) -> None:
    log = [start("a")] + [
        step(at, loss=None if at == 3 else 2.0 + at, lr=math.nan) for at in range(1, 7)
    ]
    folder = write_log(tmp_path / "a", log)
    series = read_run(folder).series
    assert series["loss"][2] == (3, None) and series["lr"][0] == (1, None)
    html = html_of(folder)
    curves = re.findall(r'<polyline[^>]*points="([^"]*)"', html[html.index('data-panel="loss"') :])
    assert [len(points.split()) for points in curves] == [2, 3]


def test_a_run_of_one_measurement_is_drawn_as_dots(tmp_path: Path) -> None:
    log = [start("a", uniform_entropy=UNIFORM), step(10, **values(10, True))]
    html = html_of(write_log(tmp_path / "a", log))
    assert panels(html) == [name for name in PANELS if name not in ("maps", "warnings", "spikes")]
    points = [each.split() for each in re.findall(r'<polyline[^>]*points="([^"]*)"', html)]
    assert len(points) > 40 and all(len(each) == 2 and each[0] == each[1] for each in points)


@pytest.mark.parametrize("number", [0.0, -1.0, 1e-320, 1e299, -1e299, 1e308, math.inf])
def test_extreme_numbers_are_drawn_in_finite_places(tmp_path: Path, number: float) -> None:
    first, second = values(10, True), dict.fromkeys(values(10, True), number)
    log = [
        start("a", uniform_entropy=number),
        step(10, **first),
        step(20, **second),
        step(30, **first),
    ]
    html = html_of(write_log(tmp_path / "a", log))
    assert len(panels(html)) == 13
    places = re.findall(r'(?:points|x[12]?|y[12]?|c[xy])="([^"]*)"', html)
    assert len(places) > 500 and not [each for each in places if re.search("nan|inf", each)]


def test_small_maps_of_many_blocks_stand_several_in_a_row(tmp_path: Path) -> None:
    """Where a run is alone; one row a block would be a page of its own."""
    log = [start("a"), *(attention_map(1, block, head) for block in range(14) for head in (0, 1))]
    folders = [write_log(tmp_path / name, log) for name in "ab"]
    for few, columns in ((folders[:1], 3), (folders, 1)):
        html = html_of(*few)
        (template, *_) = re.findall(r'id="small-0" style="grid-template-columns:([^"]*)"', html)
        assert template == " ".join(["auto repeat(2,minmax(0,132px))"] * columns)
        assert html.count("<span>head 1</span>") == columns * len(few)
        assert html.count("<span>block 13</span>") >= len(few)


def test_runs_of_one_title_are_told_apart(tmp_path: Path) -> None:
    names = ("x/a", "y/a", "b")
    log = [start("same"), step(1, loss=1.0)]
    html = html_of(*(write_log(tmp_path / name, log) for name in names))
    titles = re.findall(r'<th scope="row">([^<]*)', html)
    assert titles == ["same (a) #1", "same (a) #2", "same (b)"]


def test_a_large_model_stays_below_ten_megabytes(tmp_path: Path) -> None:
    log: list[Any] = []
    for at in range(1, 401):
        noise = random.Random(at)
        logged = values(at, True, 12, 12).items()
        noisy = {tag: (value or 0) * noise.uniform(0.8, 1) for tag, value in logged}
        log.append(step(at, **noisy))
        if at % 40 == 0:
            places = product(range(12), range(12))
            log += [attention_map(at, block, head, 32, 64) for block, head in places]
    first = write_log(tmp_path / "0", [start("0"), *log])
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        shutil.copy(first / "stability.jsonl", tmp_path / name / "stability.jsonl")
    html = html_of(tmp_path)
    assert html.count("data-cell=") == 3 * 144 and 4e6 < len(html.encode()) < 10e6
    counts = [len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', html)]
    assert max(counts) <= 300 and len(counts) > 3 * (2 * 144 + 15 * 12)
