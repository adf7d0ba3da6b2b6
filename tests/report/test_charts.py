from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from weyl_megatron.report.charts import Axis, Chart, Line, Rule, spread


def test_linear_ticks_are_round_and_inside() -> None:
    assert [text for _, text in Axis("y", 2.23, 3.84).ticks(4)] == ["2.5", "3.0", "3.5"]
    assert [value for value, _ in Axis("x", 0, 300).ticks(3)] == [0, 100, 200, 300]


def test_logarithmic_ticks_are_the_decades() -> None:
    assert Axis("α", 5e-5, 4e-3, log=True).ticks(9) == [
        (pytest.approx(1e-4), "10⁻⁴"),
        (pytest.approx(1e-3), "10⁻³"),
    ]


def test_places_apart_stay_and_close_ones_move_apart() -> None:
    assert spread([10, 100], 15) == [10, 100]
    assert spread([50, 52], 10) == [46, 56]
    moved = spread([50, 51, 58, 90], 10)
    assert all(b - a >= 10 for a, b in pairwise(moved)) and moved[3] == 90


def test_the_drawing_is_well_formed_and_leaves_out_what_is_not_a_number() -> None:
    line = Line(
        "a < b & c",
        [1, 2, 3],
        [1.0, float("nan"), 3.0],
        "red",
        label="<end>",
        band=([0, 1, 2], [2, 3, 4]),
    )
    chart = Chart("title", Axis("step", 0, 4), Axis("loss", 0, 5), [line], rules=[Rule(2, "here")])
    root = ElementTree.fromstring(chart.svg())
    (polyline,) = root.iter("polyline")
    assert polyline.get("data-name") == "a < b & c" and len(polyline.get("points", "").split()) == 2
