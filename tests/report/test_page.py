"""The skeleton of all pages, their styles and scripts, and charts as a picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html import escape
from pathlib import Path

import pytest

from tests.report.logs import parsed
from weyl_megatron import report
from weyl_megatron.report.charts import Axis, Chart, Line
from weyl_megatron.report.page import asset, cell, legend, page, row, section, table, tile
from weyl_megatron.report.sheet import sheet

EVIL = "</script><b>\"'&"
FILES = sorted(
    path.name for path in Path(report.__path__[0]).iterdir() if path.suffix in (".css", ".js")
)


def test_plain_text_is_escaped_and_html_is_not() -> None:
    parts = [
        section(EVIL, "<p>lead</p>", "<p>body</p>"),
        legend([(EVIL, "red")], EVIL),
        tile("red", EVIL, EVIL, EVIL),
        table(("<i>head</i>",), [row("red", EVIL, [cell(EVIL, EVIL)])]),
    ]
    html = page(EVIL, "".join(parts), data={"steps": [EVIL]})
    parsed(html)
    assert html.count(escape(EVIL)) == 11 and EVIL not in html and "<i>head</i>" in html
    data = re.search(r'<script type="application/json" id="steps">(.*?)</script>', html, re.S)
    assert data is not None and json.loads(data[1]) == [EVIL]


@pytest.mark.parametrize("name", FILES)
def test_styles_and_scripts_are_read_as_they_lie(name: str) -> None:
    lines = asset(name).splitlines()
    assert 10 < len(lines) <= 400 and max(map(len, lines)) <= 100
    assert "://" not in asset(name) and asset(name).endswith("\n")


def test_colours_have_their_counterpart_in_the_dark() -> None:
    for name in ("chart.css", "page.css", "maps.css"):
        light, _, dark = asset(name).partition("@media (prefers-color-scheme: dark)")
        of_light, of_dark = (set(re.findall(r"--[\w-]+(?=: #)", part)) for part in (light, dark))
        assert of_light == of_dark and of_light, name


def test_a_sheet_is_a_picture_with_its_style_and_a_legend() -> None:
    lines = [Line("a < b", [1, 2], [1.0, 2.0], "red", dashed=True), Line("c", [1], [3.0], "blue")]
    chart = Chart("title", Axis("x", 0, 4), Axis("y", 0, 5), lines, width=300, height=200)
    root = ElementTree.fromstring(sheet([[chart, chart], [chart]], lines, columns=2))
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert names[:2] == ["a < b", "c"] and names.count("title") == 3
    assert root.get("width") == "600" and root.get("height") == str(40 + 2 * 220)
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert style is not None and style.text == "\n" + asset("chart.css")
