"""Chromium by its DevTools protocol, over pipes: how long a page takes to open, and its picture.

`tests.browser` is simpler, and enough for what a page's own script can see.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser import CHROMIUM, FLAGS

# Two frames after the load something has been painted; the paint's own entry says when first.
_PAINTED = """new Promise(done => {
  const said = () => {
    const [loaded] = performance.getEntriesByType("navigation");
    const paint = performance.getEntriesByName("first-contentful-paint")[0];
    done({loaded: loaded.loadEventEnd / 1000, painted: performance.now() / 1000,
      first: paint ? paint.startTime / 1000 : null,
      wide: document.documentElement.scrollWidth});
  };
  const frames = () => requestAnimationFrame(() => requestAnimationFrame(said));
  if (document.readyState === "complete") frames(); else addEventListener("load", frames);
})"""


class Tab:
    """A page in the browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._unread = b""
        self._count = 0
        self._session = ""
        self.errors: list[str] = []  # what it wrote to the console, or threw
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, width: int, height: int = 900) -> dict[str, Any]:
        """Seconds until it was loaded, first painted, and painted after its scripts had run.

        And `busy`, the seconds that its thread computed, which no neighbour slows; and `wide`, how
        many pixels of it stand beside the window: on a phone `innerWidth` grows with what does.
        """
        self.call("Performance.enable", timeDomain="threadTicks")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=page.as_uri())
        painted = self.call(
            "Runtime.evaluate", expression=_PAINTED, awaitPromise=True, returnByValue=True
        )
        opened: dict[str, Any] = painted["result"]["value"]
        said = self.call("Performance.getMetrics")["metrics"]
        (busy,) = (metric["value"] for metric in said if metric["name"] == "TaskDuration")
        return {**opened, "wide": opened["wide"] - width, "busy": busy}

    def picture(self, out: Path, top: float = 0, height: float = 0) -> None:
        """Write a picture of the page, or of a stretch of it."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"]}
        shot = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1}
        )
        out.write_bytes(base64.b64decode(shot["data"]))

    def evaluate(self, expression: str) -> Any:
        """The value of a script."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return said["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser; return what it answers."""
        self._count += 1
        asked: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._count:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))
            if message.get("method") == "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(message["params"]["args"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            read = os.read(self._from, 1 << 20)
            assert read, "the browser has ended"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser that is started for it, and ended."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    flags = [flag for flag in FLAGS if flag != "--dump-dom"]
    # The browser reads from the descriptor 3 and writes to 4.
    started = f'exec "$@" 3<&{commands} 4>&{answers}'
    command = [str(CHROMIUM), *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    browser = subprocess.Popen(
        ["bash", "-c", started, "bash", *command],
        pass_fds=(commands, answers),
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    try:
        made = Tab(to_browser, from_browser)
        yield made
        made.call("Browser.close")
        browser.wait(timeout=60)
    finally:
        browser.kill()
        browser.wait()
        os.close(to_browser)
        os.close(from_browser)
