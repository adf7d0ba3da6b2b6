"""The headless browser in which pages are looked at, without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--dump-dom",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]

WIDTHS = (390, 1280)  # pixels of a phone and of a window

# Of frames, since a window is no narrower than 500 pixels.
FRAMES = """<!doctype html><body>BODY<script>
addEventListener("load", () => setTimeout(() => {
  const seen = [...document.querySelectorAll("iframe")].map(it => it.contentWindow.looked());
  document.body.append("SEEN" + JSON.stringify(seen) + "SEEN");
}));
</script></body>"""

# What is beside the page; which text of a chart is beside the chart, smaller than nine pixels or on
# other text; and which text has less contrast to its ground than the 4.5 of WCAG 2.1, 1.4.3.
LOOK = """<script>
function looked() {
  const seen = {images: 0, wide: document.documentElement.scrollWidth - innerWidth,
    outside: [], small: [], overlap: [], faint: []};
  for (const image of document.images) seen.images += image.naturalWidth > 0;
  for (const element of document.querySelectorAll("main *")) {
    const hasBox = !element.closest("svg, pre, .table");
    if (hasBox && element.getBoundingClientRect().right > innerWidth + 1)
      seen.outside.push(element.tagName);
  }
  for (const svg of document.querySelectorAll("svg.chart")) {
    const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent);
    const boxes = texts.map(text => text.getBoundingClientRect());
    texts.forEach((text, at) => {
      const box = boxes[at];
      if (box.left < frame.left - 1 || box.right > frame.right + 1)
        seen.outside.push(text.textContent);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 9)
        seen.small.push(text.textContent);
      boxes.forEach((other, to) => {
        if (to > at && box.left < other.right - 1 && other.left < box.right - 1
            && box.top < other.bottom - 3 && other.top < box.bottom - 3)
          seen.overlap.push(text.textContent + " / " + texts[to].textContent);
      });
    });
  }
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3).map(value => value / 255).map(value =>
    value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0.05);
  const groundOf = element => {
    for (let at = element; at; at = at.parentElement) {
      const ground = getComputedStyle(at).backgroundColor;
      if (numbers(ground)[3] !== 0) return ground;
    }
  };
  for (const element of document.querySelectorAll("main *")) {
    const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!hasText) continue;
    const style = getComputedStyle(element);
    const pair = [light(element.closest("svg") ? style.fill : style.color),
      light(groundOf(element))];
    if (Math.max(...pair) / Math.min(...pair) < 4.5) seen.faint.push(element.textContent);
  }
  return seen;
}
</script></body>"""


def look(html: str, folder: Path, is_dark: bool) -> list[dict[str, Any]]:
    """What there is to see of a page on a phone and in a window, in light or in dark.

    Raises:
        AssertionError: the page wrote to the console.
    """
    page, frames = folder / "looked.html", folder / "frames.html"
    page.write_text(html.replace("</body>", LOOK), encoding="utf-8")
    both = (f'<iframe src="{page.name}" width="{wide}" height="800"></iframe>' for wide in WIDTHS)
    frames.write_text(FRAMES.replace("BODY", "".join(both)), encoding="utf-8")
    command = [
        str(CHROMIUM),
        *FLAGS,
        "--window-size=1400,900",
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}",
        frames.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    seen: list[dict[str, Any]] = json.loads(ran.stdout.rpartition("</script>")[2].split("SEEN")[1])
    return seen


def faults(seen: dict[str, Any]) -> dict[str, Any]:
    """What is wrong of what was seen: nothing, if all is well."""
    kinds = ("outside", "small", "overlap", "faint")
    wrong = {kind: sorted(set(seen[kind])) for kind in kinds if seen[kind]}
    return {**wrong, "wide": seen["wide"]} if seen["wide"] > 0 else wrong
