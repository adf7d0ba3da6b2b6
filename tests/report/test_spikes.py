"""Steps at which a norm jumped: marked in the chart of the loss, and listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM
from tests.devtools import tab
from tests.report.logs import html_of, panels, spike, start, step, write_log
from weyl_megatron.report.events import worst_and_last
from weyl_megatron.report.runs import read_run


def log(*spikes: dict[str, Any]) -> list[dict[str, Any]]:
    steps = [step(at, loss=3.0 - at / 100) for at in range(10, 110, 10)]
    return [start("a"), *steps, *spikes]


def rows_of(html: str) -> list[list[str]]:
    """The rows of the panel's table, without the run."""
    panel = html[html.index('data-panel="spikes"') :].split("</section>")[0]
    rows = re.findall(r"<tr.*?</tr>", panel)[1:]
    return [re.sub(r"(<[^>]+>)+", "|", each).strip("|").split("|")[1:] for each in rows]


def test_a_spike_is_marked_at_its_step_and_listed_with_its_worst_matrix(tmp_path: Path) -> None:
    html = html_of(write_log(tmp_path / "a", log(spike(50), spike(75, 20.0, "skip"))))
    (loss,) = re.findall(r'data-panel="loss".*?</section>', html)
    left, right = map(float, re.findall(r'data-box="([^,]*),([^,]*)', loss)[0])
    marks = re.findall(r'class="mark" data-at="(\d+)" data-name="([^"]*)"', loss)
    assert marks == [
        (str(round(left + (right - left) * at / 100)), name)
        for at, name in ((50, "step 50: log"), (75, "step 75: skip"))
    ]
    assert loss.count('<span class="marked">a spike: a norm jumped</span>') == 1
    assert rows_of(html) == [
        ["50", "log", "h.1.attn.q.weight", "and 1 more", "4.2", "1.1", "14"],
        ["75", "skip", "h.5.attn.q.weight", "and 1 more", "6", "1.1", "20"],
    ]


def test_without_spikes_nothing_is_said_of_them(tmp_path: Path) -> None:
    html = html_of(write_log(tmp_path / "a", log()))
    assert panels(html) == ["summary", "loss"]
    body = html.partition("<main>")[2].partition("</main>")[0]
    assert "spike" not in body and "mark" not in body


def test_a_norm_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "a", log(spike(20, None, norm=None), spike(30, 1e6)))
    read = read_run(folder)
    assert [each.severity for each in read.spikes] == [float("inf"), 1e6] and not read.notes
    assert rows_of(html_of(folder))[0][-3:] == ["not finite", "1.1", "not finite"]


def test_of_many_the_worst_and_the_last_are_listed(tmp_path: Path) -> None:
    many = [spike(at, 900.0 if at in (13, 40) else 14.0 + at / 1000) for at in range(1, 2001)]
    folder = write_log(tmp_path / "a", log(*many))
    html = html_of(folder)
    assert [int(cells[0]) for cells in rows_of(html)] == [13, 40, *range(1996, 2001)]
    assert "7 of 2000 are listed." in html
    assert [each.step for each in worst_and_last(read_run(folder).spikes, 5)][:2] == [13, 40]
    # One mark a pixel at most, which names three spikes at most.
    marks = re.findall(r'class="mark" data-at="(\d+)" data-name="([^"]*)"', html)
    assert len({place for place, _ in marks}) == len(marks) <= 820
    assert marks[1][1].startswith("step 2: log, step 3: log")


def test_spikes_that_are_made_again_are_those_of_the_later_start(tmp_path: Path) -> None:
    lines = [*log(spike(50), spike(90)), start("a"), step(60, loss=1.0), spike(70)]
    assert [each.step for each in read_run(write_log(tmp_path / "a", lines)).spikes] == [50, 70]


def test_a_spike_with_many_matrices_is_kept_as_its_worst(tmp_path: Path) -> None:
    matrices = [{"name": str(at), "norm": 1.0, "usual": 1.0, "z": float(at)} for at in range(500)]
    line = {"event": "spike", "step": 5, "action": "log", "matrices": matrices}
    (kept,) = read_run(write_log(tmp_path / "a", log(line))).spikes
    assert kept.spiked == 500 and [each.name for each in kept.matrices] == ["499", "498", "497"]


HOVER = """(() => {
  const mark = document.querySelectorAll(".mark")[1].getBoundingClientRect();
  const svg = document.querySelector('[data-panel="loss"] svg.chart');
  svg.dispatchEvent(new PointerEvent("pointermove",
    {clientX: mark.left + mark.width / 2, clientY: mark.top - 20}));
  const area = svg.getBoundingClientRect();
  return {text: box.textContent, shown: box.style.display, isInside: mark.right <= area.right};
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_pointer_on_a_mark_names_the_spike(tmp_path: Path, width: int) -> None:
    folder = write_log(tmp_path / "a", log(spike(50), spike(100, 20.0, "skip")))
    html_of(folder)
    with tab(tmp_path / "profile") as shown:
        opened = shown.open(folder / "deep" / "report.html", width)
        said = shown.evaluate(HOVER)
        assert opened["wide"] <= 0 and shown.errors == []
    assert said["shown"] == "block" and said["isInside"]
    assert said["text"].startswith("step 100") and "step 100: skip" in said["text"]
