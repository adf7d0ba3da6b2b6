"""The demo itself, from the command line to the report. It takes minutes; `-m "not demo"` leaves it
out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, FLAGS

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.demo

POINT_AT_EVERY_CHART = """<script>
for (const svg of document.querySelectorAll("svg.chart")) {
  const box = svg.getBoundingClientRect();
  const at = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  document.body.append(document.getElementById("values").textContent + ";");
}
</script></body>"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "weyl_megatron.cli", "demo", "--out", str(out)]
    return out, subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=dict(os.environ)
    )


@pytest.fixture(scope="module")
def results(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    out, run = demo
    assert (out / "results.json").exists(), run.stdout + run.stderr
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return loaded


def test_adamw_without_warmup_fails(results: dict[str, Any]) -> None:
    assert results["runs"]["adamw"]["validation_loss"] >= results["unigram_entropy"]


def test_adamw2_with_the_papers_tau_is_close_to_warmup(results: dict[str, Any]) -> None:
    losses = {name: run["validation_loss"] for name, run in results["runs"].items()}
    assert losses["adamw2"] <= losses["adamw-warmup"] + 0.10


def test_adamw2_auto_is_no_worse_than_warmup(results: dict[str, Any]) -> None:
    losses = {name: run["validation_loss"] for name, run in results["runs"].items()}
    assert losses["adamw2-auto"] <= losses["adamw-warmup"] < results["unigram_entropy"]


def test_the_command_says_so(
    demo: tuple[Path, subprocess.CompletedProcess[str]], results: dict[str, Any]
) -> None:
    out, run = demo
    assert run.returncode == 0 and run.stderr == ""
    assert all(
        claim["holds"] and f"✓ {claim['claim']}" in run.stdout for claim in results["claims"]
    )
    assert str(out / "report.html") in run.stdout
    assert "left" in run.stdout and "clipped" in run.stdout


def test_the_runs_take_less_than_five_minutes(results: dict[str, Any]) -> None:
    assert sum(run["seconds"] for run in results["runs"].values()) < 300


def test_all_runs_start_alike(
    demo: tuple[Path, subprocess.CompletedProcess[str]], results: dict[str, Any]
) -> None:
    logs = [
        (demo[0] / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        for name in results["runs"]
    ]
    assert len({json.loads(log[1])["loss"] for log in logs}) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_report_works_in_a_browser(
    demo: tuple[Path, subprocess.CompletedProcess[str]], results: dict[str, Any], tmp_path: Path
) -> None:
    report = (demo[0] / "report.html").read_text(encoding="utf-8")
    pointed = tmp_path / "report.html"
    pointed.write_text(report.replace("</body>", POINT_AT_EVERY_CHART), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", pointed.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr, run.stderr
    shown = run.stdout.rpartition("</script>")[2]
    charts = report.count('<svg class="chart"')
    assert charts == 1 + 2 * 9 + results["setting"]["model"]["layers"]
    assert shown.count("step ") == charts and "NaN" not in shown


def test_stopping_the_command_stops_its_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weyl_megatron.cli", "demo", "--out", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "adamw" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    run.terminate()
    run.communicate(timeout=60)
    assert log.exists() and run.returncode == 130
    written = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == written, "a worker still trains"
