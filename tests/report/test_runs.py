"""Logs as they are read: broken ones, started again, the demo's."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.demo.synthetic import synthetic_results
from tests.report.logs import html_of, panels, parsed, start, step, write_log
from tests.report.test_report import PANELS
from weyl_megatron.cli import main
from weyl_megatron.demo.recipe import RUNS
from weyl_megatron.report.events import AttentionMap, pooled
from weyl_megatron.report.points import stretches, thin
from weyl_megatron.report.report import write_report
from weyl_megatron.report.run import matrix_place
from weyl_megatron.report.runs import read_run


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    rng = random.Random(0)
    for length in (1, 299, 300, 301, 302, 1000, 4567):
        points = [(at, None if at == 200 else rng.random()) for at in range(length)]
        if length > 900:
            points[437] = (437, 9.0)
            points[801] = (801, -9.0)
        few = thin(points, 300)
        assert (
            len(few) <= 300
            and few == sorted(set(few), key=lambda point: point[0])
            and set(few) <= set(points)
        )
        assert few[0] == points[0] and few[-1] == points[-1]
        assert length <= 200 or len(stretches(few)) == 2
        assert length <= 900 or {(437, 9.0), (801, -9.0)} <= set(few)
        assert length > 300 or few == points


def test_large_maps_are_pooled_by_their_maximum() -> None:
    data = bytearray(4 * 8)
    data[8 * 3 + 5] = 200
    small = pooled(AttentionMap(1, 0, 0, 4, 8, bytes(data)), 2)
    assert (small.rows, small.cols, list(small.levels)) == (2, 2, [0, 0, 0, 200])


def test_names_of_matrices() -> None:
    assert matrix_place("model.layers.3.self_attn.q_proj.weight") == ("self_attn.q_proj", 3)
    assert matrix_place("h.0.attn.c_attn.weight[q]") == ("attn.c_attn[q]", 0)
    assert matrix_place("h.1.mlp.experts.12.fc1.weight") == ("mlp.experts.*.fc1", 1)
    assert matrix_place("lm_head.weight") == ("lm_head", None)


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        (["nonsense\n"], "line 2 is not JSON"),
        (["[1]\n", "7\n"], "2 lines (2, 3) are not an object"),
        ([{"event": "stop"}], "line 2 is of the unknown event 'stop'"),
        ([{"event": "step", "values": {}}], "line 2 is a step without a number of its step"),
        (
            [{"event": "step", "step": -1, "values": {}}],
            "line 2 is a step without a number of its step",
        ),
        ([{"event": "step", "step": 1, "values": [1]}], "line 2 is a step without values"),
        ([step(9, loss="low", lr=True)], "line 2 is a step with values that are not numbers"),
        (
            [
                {
                    "event": "map",
                    "step": 9,
                    "block": 0,
                    "head": 0,
                    "rows": 2,
                    "cols": 2,
                    "levels": "00",
                }
            ],
            "line 2 is a map whose levels are not rows × cols",
        ),
        (
            [
                {
                    "event": "map",
                    "step": 9,
                    "block": 0,
                    "head": 0,
                    "rows": 1,
                    "cols": 1,
                    "levels": "zz",
                }
            ],
            "line 2 is a map whose levels are not hexadecimal",
        ),
        (
            [{"event": "warning", "step": 9, "text": "x"}],
            "line 2 is a warning without its block and head",
        ),
        (
            [{"event": "spike", "step": 9, "action": "log"}],
            "line 2 is a spike without its matrices",
        ),
        ([step(9, lr=1.0), step(8, lr=1.0)], "line 3 is a step that is before the last one"),
        (
            [{"event": "start", "version": 2}],
            "a is of version 2, this reads 1; what it knows of it is shown",
        ),
        (["[" * 100_000 + "\n"], "line 2 is not JSON"),
    ],
)
def test_what_cannot_be_read_is_noted_and_the_rest_shown(
    tmp_path: Path, lines: list[Any], note: str
) -> None:
    folder = write_log(tmp_path / "a", [start("a"), *lines, step(10, loss=2.0)])
    notes = write_report([folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(notes) == 1 and note in notes[0], notes
    assert read_run(folder).series["loss"][-1] == (10, 2.0)
    assert panels(html) == ["summary", "loss", "notes"]
    assert notes[0] in parsed(html).text


def test_a_log_that_ends_inside_a_line(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "a", [start("a"), step(1, loss=2.0), '{"event": "step", "st'])
    assert write_report([folder], tmp_path / "r.html") == [
        f"{folder / 'stability.jsonl'}: line 3 is cut off."
    ]


def test_a_run_that_was_started_again_replaces_what_it_repeats(tmp_path: Path) -> None:
    frame = {"event": "map", "block": 0, "head": 0, "rows": 1, "cols": 1, "levels": "ff"}
    before = [step(at, loss=9.0, old=1.0) for at in (1, 10, 20, 30)] + [{**frame, "step": 30}]
    warned = {"event": "warning", "step": 30, "block": 0, "head": 0, "text": "x"}
    folder = write_log(
        tmp_path / "a",
        [start("a"), *before, warned, start("b"), step(20, loss=1.0), step(40, loss=2.0)],
    )
    read = read_run(folder)
    assert read.series["loss"] == [(1, 9.0), (10, 9.0), (20, 1.0), (40, 2.0)] and read.title == "b"
    assert read.series["old"] == [(1, 1.0), (10, 1.0)] and not read.maps and not read.warnings
    assert read.notes == [
        "a was started again at step 20; what it logged from there on before is left out."
    ]
    later = write_log(
        tmp_path / "c", [start("c"), step(10, loss=1.0), start("c"), step(20, loss=2.0)]
    )
    assert read_run(later).series["loss"] == [(10, 1.0), (20, 2.0)] and not read_run(later).notes


def test_nothing_readable_stops_with_a_sentence_that_names_the_folder(tmp_path: Path) -> None:
    for name, lines in {
        "empty": [],
        "started": [start("a")],
        "broken": ["{\n"],
        "binary": ["\x00\x01\n"],
    }.items():
        folder = write_log(tmp_path / name, lines)
        with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
            write_report([folder], tmp_path / "report.html")
        assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")
    (tmp_path / "bare").mkdir()
    for folder in (tmp_path / "bare", tmp_path / "absent"):
        with pytest.raises(
            ValueError, match=re.escape(f"{folder} has no stability.jsonl or log.jsonl")
        ):
            write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_one_unreadable_run_does_not_hide_another(tmp_path: Path) -> None:
    good = write_log(tmp_path / "good", [start("good"), step(1, loss=1.0)])
    notes = write_report([tmp_path / "absent", good], tmp_path / "report.html")
    assert notes == [f"{tmp_path / 'absent'} has no stability.jsonl or log.jsonl."]


def test_the_command_says_where_the_page_is_and_what_is_not_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_log(tmp_path / "a", [start("a"), "?\n", step(1, loss=1.0)])
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "r.html") in first and second.endswith("line 2 is not JSON.")


def test_a_folder_of_the_demo_is_its_runs(tmp_path: Path) -> None:
    synthetic_results(tmp_path)
    html = html_of(tmp_path)
    assert panels(html) == ["summary", "loss", "rates", "clipped", "entropy"]
    missing = re.findall(r'data-missing="(\w+)"', html)
    assert (
        panels(html) + missing == sorted(PANELS[:-1], key=(panels(html) + missing).index)
        and len(missing) == 10
    )
    assert all(each.title in html for each in RUNS) and "validation 3.15" in html
    read = read_run(tmp_path / "adamw2")
    assert read.title == "AdamW², τ = 0.01" and read.uniform_entropy == pytest.approx(3.2057531)
    assert read.heads("entropy")[1, 1][0] == (1, 2.0) and read.matrices("lr")["h.0.attn.q.weight"]


def test_a_run_of_the_demo_without_a_title_has_its_folders_name(tmp_path: Path) -> None:
    synthetic_results(tmp_path)
    log = tmp_path / "adamw2" / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    first = {key: value for key, value in json.loads(lines[0]).items() if key != "title"}
    log.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n", encoding="utf-8")
    assert read_run(tmp_path / "adamw2").title == "adamw2"
