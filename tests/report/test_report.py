"""The page of watched runs: of logs that were never trained, of broken ones, and in a browser."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM
from tests.browser import FLAGS as BROWSER_FLAGS
from tests.demo import test_report
from tests.demo.synthetic import synthetic_results
from weyl_megatron.demo.recipe import RUNS
from weyl_megatron.report.report import run, write_report
from weyl_megatron.report.runs import AttentionMap, matrix_place, pooled, read_run, stretches, thin

FLAGS = [*BROWSER_FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND"]
PROBE = """<script>
const probed = {values: [], heats: []};
for (const svg of document.querySelectorAll("svg.chart")) {
  const area = svg.getBoundingClientRect();
  const at = {clientX: area.left + area.width / 2, clientY: area.top + area.height / 2};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  probed.values.push(box.style.display === "block" ? box.textContent : "");
  svg.dispatchEvent(new PointerEvent("pointerleave"));
}
const pixels = canvas => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
for (const canvas of document.querySelectorAll(".heat canvas")) {
  const area = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: area.right - 2, clientY: area.bottom - 2}));
  probed.heats.push([canvas.width, canvas.height, pixels(canvas), box.textContent]);
}
function look(step) {
  slider.value = step;
  slider.dispatchEvent(new Event("input"));
  return [0, 1].map(number => {
    const figure = document.getElementById("big-" + number);
    const small = document.querySelector("#small-" + number + " canvas");
    return {pixels: pixels(figure.querySelector("canvas")), text: figure.textContent, small: pixels(small)};
  });
}
probed.first = look(0);
probed.last = look(slider.max);
document.querySelectorAll("#small-1 button")[3].click();
probed.other = look(slider.max);
player.click();
probed.playing = [player.textContent, slider.value];
document.body.append("PROBED" + JSON.stringify(probed) + "PROBED");
</script></body>"""

BLOCKS, HEADS, STEPS, LAST = 2, 2, range(10, 130, 10), 120
TERMS = [
    "sigma_q",
    "sigma_k",
    "sigma_v",
    "sigma_o",
    "sigma_1",
    "sigma_2",
    "sigma_qk",
    "sigma_ov",
    "sigma_21",
]
TERMS += ["norm1_gain", "norm1_bias", "norm2_gain", "norm2_bias", "x", "grad_x"]
PANELS = [
    "summary",
    "loss",
    "rates",
    "clipped",
    "terms",
    "energy",
    "entropy",
    "modes",
    "maps",
    "similarity",
]
PANELS += ["gradients", "sharpness", "warnings"]
UNIFORM = math.log(16)


class Page(test_report.Page):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "input":
            self.attributes += attrs
        else:
            super().handle_starttag(tag, attrs)


def values(
    step: int, collapses: bool, blocks: int = BLOCKS, heads: int = HEADS
) -> dict[str, float | None]:
    grown = min(1.0, step / LAST) if collapses else 0.0
    found: dict[str, float | None] = {"loss": 3.0 if collapses else 5.0 - step / 60, "lr": 0.01}
    found |= {"sharpness": 10 + grown, "sharpness_adam": 90.0, "sharpness_threshold": 3800.0}
    for block in range(blocks):
        found |= {f"block/{block}/{term}": 1 + block + 9 * grown for term in TERMS}
        found |= {f"block/{block}/grad_{role}": 0.1 * (1 - grown) + 1e-6 for role in "qkv"}
        found[f"block/{block}/similarity"] = 0.1 + 0.8 * grown
        for head in range(heads):
            tag = f"block/{block}/head/{head}"
            entropy = UNIFORM * (0.7 - 0.69 * grown)
            found |= {
                f"{tag}/sigma_qk": 2 + 50 * grown + head,
                f"{tag}/sec": 0.5 + 0.4 * grown + 0.01 * block,
            }
            found |= {
                f"{tag}/effective_rank": 9 - 8 * grown,
                f"{tag}/stable_rank": 2.0,
                f"{tag}/map_rank": 5.0,
            }
            found |= {
                f"{tag}/entropy": entropy,
                f"{tag}/mode": 2.0 if grown > 0.5 else float(head == 1) * 3,
            }
        for kind in ("attn.q", "mlp.fc"):
            name = f"h.{block}.{kind}.weight"
            found |= {f"clip/{name}/lr": 0.002 * (1 + block), f"clip/{name}/clipped": 1.0}
    found |= {"clip/wte.weight/lr": 0.01, "clip_share/attn.q": 1.0, "clip_share/mlp.fc": 0.5}
    return found | {f"clip_share_block/{block}": 0.75 for block in range(blocks)}


def levels(step: int, block: int, head: int, rows: int = 16, cols: int = 16) -> bytes:
    """A map that no other step, block or head has."""
    return random.Random(f"{step} {block} {head}").randbytes(rows * cols - 1) + b"\xff"


def start(title: str, **more: Any) -> dict[str, Any]:
    names = [f"h.{block}" for block in range(BLOCKS)]
    return {
        "event": "start",
        "version": 1,
        "run": title,
        "blocks": names,
        "heads": HEADS,
        "sec": 4,
        **more,
    }


def records(title: str, collapses: bool) -> list[dict[str, Any]]:
    log = [start(title, uniform_entropy=UNIFORM, interval=10, something=[1])]
    for step in STEPS:
        log.append({"event": "step", "step": step, "values": values(step, collapses)})
        for block, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = {
                "block": block,
                "head": head,
                "rows": 16,
                "cols": 16,
                "queries": list(range(16)),
            }
            log.append(
                {"event": "map", "step": step, **place, "levels": levels(step, block, head).hex()}
            )
    if collapses:
        log.append(
            {
                "event": "warning",
                "step": 70,
                "block": 1,
                "head": 0,
                "text": "entropy <fell> & σ₁ climbed",
            }
        )
    return log


def write_log(folder: Path, lines: list[Any], name: str = "stability.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def step(number: int, **tags: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "values": tags}


def html_of(*folders: Path) -> str:
    out = folders[0] / "deep" / "report.html"
    write_report(folders, out)
    return out.read_text(encoding="utf-8")


def panels(html: str) -> list[str]:
    return re.findall(r'data-panel="(\w+)"', html)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("runs")
    write_log(out / "a", records("AdamW, no warmup", True))
    write_log(out / "b", records("AdamW²", False))
    return html_of(out / "a", out / "b")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    parsed = Page()
    parsed.feed(html)
    parsed.close()
    assert parsed.open == []
    return parsed


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


def test_entropy_is_the_mean_of_a_blocks_heads_at_its_steps(html: str) -> None:
    schedule = re.findall(r'data-name="schedule" points="([^"]*)"', html)[0].split()
    charts = html[html.index('data-panel="entropy"') : html.index('data-panel="modes"')].split(
        "<svg class"
    )[1:]
    assert len(charts) == BLOCKS and all("uniform</text>" in chart for chart in charts)
    for chart in charts:
        low, high = map(float, re.findall(r'data-y="([^,]*),([^,]*)', chart)[0])
        top, base = map(float, re.findall(r'data-box="[^,]*,[^,]*,([^,]*),([^"]*)"', chart)[0])
        for collapses, points in zip(
            (True, False), re.findall(r'<polyline[^>]*points="([^"]*)"', chart), strict=True
        ):
            places = [tuple(map(float, point.split(","))) for point in points.split()]
            assert [x for x, _ in places] == [float(point.split(",")[0]) for point in schedule]
            drawn = [low + (base - y) / (base - top) * (high - low) for _, y in places]
            told = [values(at, collapses)["block/0/head/0/entropy"] for at in STEPS]
            assert drawn == pytest.approx(told, abs=1e-3)
        assert chart.count("<polygon") == 2


def test_titles_texts_and_names_are_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'&"
    log = [
        start(evil, sec=evil),
        step(1, **{"loss": 1.0, f"clip/{evil}/lr": 1.0, f"clip_share/{evil}": 1.0}),
    ]
    log += [step(2, **{"block/0/head/0/sec": 0.5, "block/0/head/0/mode": 1e9})]
    log.append({"event": "warning", "step": 1, "block": 0, "head": 0, "text": evil})
    html = html_of(write_log(tmp_path / "a", [*log, {"event": evil}]))
    assert "alert(1)" in html and "<script>alert" not in html and html.count("</script>") == 3
    parsed = Page()
    parsed.feed(html)
    assert parsed.open == []


def test_what_is_not_a_number_is_a_gap(tmp_path: Path) -> None:
    log = [start("a")] + [
        step(at, loss=None if at == 3 else 2.0 + at, lr=math.nan) for at in range(1, 7)
    ]
    folder = write_log(tmp_path / "a", log)
    assert read_run(folder).series["loss"][2] == (3, None) and read_run(folder).series["lr"][0] == (
        1,
        None,
    )
    html = html_of(folder)
    loss = html[html.index('data-panel="loss"') :]
    assert [
        len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', loss)
    ] == [2, 3]


def test_a_run_of_one_measurement_is_drawn_as_dots(tmp_path: Path) -> None:
    html = html_of(
        write_log(
            tmp_path / "a", [start("a", uniform_entropy=UNIFORM), step(10, **values(10, True))]
        )
    )
    assert panels(html) == [name for name in PANELS if name not in ("maps", "warnings")]
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
    assert len(panels(html)) == 11
    places = re.findall(r'(?:points|x[12]?|y[12]?|c[xy])="([^"]*)"', html)
    assert len(places) > 500 and not [each for each in places if re.search("nan|inf", each)]


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
    noted = Page()
    noted.feed(html)
    assert notes[0] in noted.text


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
    assert run(argparse.Namespace(runs=[folder], out=tmp_path / "r.html")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "r.html") in first and second.endswith("line 2 is not JSON.")


def test_a_folder_of_the_demo_is_its_runs(tmp_path: Path) -> None:
    synthetic_results(tmp_path)
    html = html_of(tmp_path)
    assert panels(html) == ["summary", "loss", "rates", "clipped", "entropy"]
    missing = re.findall(r'data-missing="(\w+)"', html)
    assert (
        panels(html) + missing == sorted(PANELS, key=(panels(html) + missing).index)
        and len(missing) == 8
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


def test_runs_of_one_title_are_told_apart(tmp_path: Path) -> None:
    names = ("x/a", "y/a", "b")
    html = html_of(
        *(write_log(tmp_path / name, [start("same"), step(1, loss=1.0)]) for name in names)
    )
    titles = re.findall(r'<th scope="row">([^<]*)', html)
    assert titles == ["same (a) #1", "same (a) #2", "same (b)"]


def test_a_large_model_stays_below_ten_megabytes(tmp_path: Path) -> None:
    size = {"rows": 32, "cols": 64}
    log: list[Any] = []
    for at in range(1, 401):
        noise = random.Random(at)
        noisy = {
            tag: (value or 0) * noise.uniform(0.8, 1)
            for tag, value in values(at, True, 12, 12).items()
        }
        log.append(step(at, **noisy))
        places = (
            [(block, head) for block in range(12) for head in range(12)] if at % 40 == 0 else []
        )
        log += [
            {
                "event": "map",
                "step": at,
                "block": b,
                "head": h,
                **size,
                "levels": levels(at, b, h, 32, 64).hex(),
            }
            for b, h in places
        ]
    first = write_log(tmp_path / "0", [start("0"), *log])
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        shutil.copy(first / "stability.jsonl", tmp_path / name / "stability.jsonl")
    html = html_of(tmp_path)
    assert html.count("data-cell=") == 3 * 144 and 4e6 < len(html.encode()) < 10e6
    counts = [len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', html)]
    assert max(counts) <= 300 and len(counts) > 3 * (2 * 144 + 15 * 12)


def browse(html: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What the probe saw in the page, without a network and without an error on the console."""
    probed = folder / "report.html"
    probed.write_text(html.replace("</body>", PROBE), encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        *flags,
        f"--user-data-dir={folder / 'profile'}",
        probed.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.rpartition("</script>")[2].split("PROBED")[1])
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_works_in_a_browser(html: str, tmp_path: Path) -> None:
    told = browse(html, tmp_path)
    assert len(told["values"]) == html.count('<svg class="chart"') == 57
    assert all(value.startswith("step ") and "NaN" not in value for value in told["values"])
    assert all(int(value.split("step ")[1][:2]) in STEPS for value in told["values"])
    for cols, rows, pixels, text in told["heats"]:
        assert (cols, rows) == (len(STEPS), BLOCKS * HEADS) and set(pixels[3::4]) == {255}
        assert text.startswith("step 120block 1, head 1: ")
    assert [text.split(": ")[1] for *_, text in told["heats"]][2:] == [
        "malignant collapse",
        "uniform",
    ]
    collapsed, well = (bytes(pixels[-4:-1]).hex() for *_, pixels, _ in told["heats"][2:])
    assert [collapsed, well] == [re.findall(rf"--mode-{mode}: #(\w+)", html)[0] for mode in (2, 3)]
    for when, at in (("first", 10), ("last", LAST)):
        for shown in told[when]:
            assert shown["pixels"][3::4] == shown["small"][3::4] == list(levels(at, 0, 0)), when
            assert f"block 0, head 0 · step {at} ·" in shown["text"]
    assert "malignant collapse" in told["last"][0]["text"] and "normal" in told["first"][0]["text"]
    for shown in told["other"]:
        assert (
            shown["pixels"][3::4] == list(levels(LAST, 1, 1)) and "block 1, head 1" in shown["text"]
        )
    assert told["playing"] == ["❚❚ pause", "0"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_light_and_dark_have_their_colours(html: str, tmp_path: Path) -> None:
    for number, scheme in enumerate(re.findall(r"--run-0: #(\w{6})", html)):
        (tmp_path / scheme).mkdir()
        flag = f"--blink-settings=preferredColorScheme={1 - number}"
        told = browse(html, tmp_path / scheme, flag)
        assert bytes(told["last"][0]["pixels"][-4:-1]).hex() == scheme, (
            "the last pixel has the whole colour"
        )
