"""The page of watched runs in a browser."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, FLAGS, faults, look
from tests.report.logs import BLOCKS, HEADS, LAST, STEPS, levels

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

PROBE = """<script>
const probed = {values: [], heats: []};
for (const svg of document.querySelectorAll("svg.chart")) {
  const area = svg.getBoundingClientRect();
  const at = {clientX: area.left + area.width / 2, clientY: area.top + area.height / 2};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  probed.values.push(box.style.display === "block" ? box.textContent : "");
  svg.dispatchEvent(new PointerEvent("pointerleave"));
}
const pixels = canvas =>
  [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
for (const canvas of document.querySelectorAll(".heat canvas")) {
  const area = canvas.getBoundingClientRect();
  const at = {clientX: area.right - 2, clientY: area.bottom - 2};
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  probed.heats.push([canvas.width, canvas.height, pixels(canvas), box.textContent]);
}
function look(step) {
  slider.value = step;
  slider.dispatchEvent(new Event("input"));
  return [0, 1].map(number => {
    const figure = document.getElementById("big-" + number);
    const small = document.querySelector("#small-" + number + " canvas");
    const large = pixels(figure.querySelector("canvas"));
    return {pixels: large, text: figure.textContent, small: pixels(small)};
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


def browse(html: str, folder: Path, *flags: str) -> dict[str, Any]:
    """What the probe saw in the page, without a network and without an error on the console."""
    page = folder / "report.html"
    page.write_text(html.replace("</body>", PROBE), encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        *flags,
        f"--user-data-dir={folder / 'profile'}",
        page.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    seen: dict[str, Any] = json.loads(ran.stdout.rpartition("</script>")[2].split("PROBED")[1])
    return seen


def test_the_page_works_in_a_browser(html: str, tmp_path: Path) -> None:
    probed = browse(html, tmp_path)
    assert len(probed["values"]) == html.count('<svg class="chart"') == 75
    assert all(value.startswith("step ") and "NaN" not in value for value in probed["values"])
    assert all(int(value.split("step ")[1][:2]) in STEPS for value in probed["values"])
    for cols, rows, pixels, text in probed["heats"]:
        assert (cols, rows) == (len(STEPS), BLOCKS * HEADS) and set(pixels[3::4]) == {255}
        assert text.startswith("step 120block 1, head 1: ")
    assert [text.split(": ")[1] for *_, text in probed["heats"]][2:] == [
        "malignant collapse",
        "uniform",
    ]
    collapsed, well = (bytes(pixels[-4:-1]).hex() for *_, pixels, _ in probed["heats"][2:])
    assert [collapsed, well] == [re.findall(rf"--mode-{mode}: #(\w+)", html)[0] for mode in (2, 3)]
    for when, at in (("first", 10), ("last", LAST)):
        for shown in probed[when]:
            assert shown["pixels"][3::4] == shown["small"][3::4] == list(levels(at, 0, 0)), when
            assert f"block 0, head 0 · step {at} ·" in shown["text"]
    assert (
        "malignant collapse" in probed["last"][0]["text"] and "normal" in probed["first"][0]["text"]
    )
    for shown in probed["other"]:
        assert (
            shown["pixels"][3::4] == list(levels(LAST, 1, 1)) and "block 1, head 1" in shown["text"]
        )
    assert probed["playing"] == ["❚❚ pause", "0"]


def test_light_and_dark_have_their_colours(html: str, tmp_path: Path) -> None:
    for number, scheme in enumerate(re.findall(r"--run-0: #(\w{6})", html)):
        (tmp_path / scheme).mkdir()
        flag = f"--blink-settings=preferredColorScheme={1 - number}"
        probed = browse(html, tmp_path / scheme, flag)
        # The last pixel has the whole colour.
        assert bytes(probed["last"][0]["pixels"][-4:-1]).hex() == scheme


@pytest.mark.parametrize("is_dark", [False, True])
def test_all_of_it_is_legible_on_a_phone_and_in_a_window(
    html: str, tmp_path: Path, is_dark: bool
) -> None:
    assert [faults(seen) for seen in look(html, tmp_path, is_dark)] == [{}, {}]


def test_what_is_illegible_is_found(html: str, tmp_path: Path) -> None:
    """The look itself: a page without the layout for phones, and with pale ink."""
    spoilt = html.replace("fitAll();\n", "").replace("--ink-3: #6c7077", "--ink-3: #80848b")
    phone, window = (faults(seen) for seen in look(spoilt, tmp_path, is_dark=False))
    assert "step" in phone["small"] and "step" in phone["faint"]
    assert "step" in window["faint"] and "small" not in window
