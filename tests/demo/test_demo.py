"""The demo itself, from the command line to the report: minutes, which `-m "not demo"` saves."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Demo:
    """A demo that was run."""

    out: Path
    run: subprocess.CompletedProcess[str]
    cpu_seconds: float  # of all its processes


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "weyl_megatron.cli", "demo", "--out", str(out)]
    before = cpu_seconds_of_children()
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env=dict(os.environ)
    )
    return Demo(out, run, cpu_seconds_of_children() - before)


@pytest.fixture(scope="module")
def results(demo: Demo) -> dict[str, Any]:
    path = demo.out / "results.json"
    assert path.exists(), demo.run.stdout + demo.run.stderr
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def test_adamw_without_warmup_fails(results: dict[str, Any]) -> None:
    assert results["runs"]["adamw"]["validation_loss"] >= results["unigram_entropy"]


def test_adamw2_with_the_papers_tau_is_close_to_warmup(results: dict[str, Any]) -> None:
    losses = {name: run["validation_loss"] for name, run in results["runs"].items()}
    assert losses["adamw2"] <= losses["adamw-warmup"] + 0.10


def test_adamw2_auto_is_no_worse_than_warmup(results: dict[str, Any]) -> None:
    losses = {name: run["validation_loss"] for name, run in results["runs"].items()}
    assert losses["adamw2-auto"] <= losses["adamw-warmup"] < results["unigram_entropy"]


def test_the_command_says_so(demo: Demo, results: dict[str, Any]) -> None:
    out, run = demo.out, demo.run
    assert run.returncode == 0 and run.stderr == ""
    assert all(
        claim["holds"] and f"✓ {claim['claim']}" in run.stdout for claim in results["claims"]
    )
    assert str(out / "report.html") in run.stdout
    assert "left" in run.stdout and "clipped" in run.stdout


def test_the_runs_take_less_than_five_minutes(demo: Demo) -> None:
    """Of both cores. Other processes on the machine make the demo longer, but use no time of it."""
    assert demo.run.returncode == 0 and demo.cpu_seconds < 2 * 300


def test_all_runs_start_alike(demo: Demo, results: dict[str, Any]) -> None:
    paths = [demo.out / name / "log.jsonl" for name in results["runs"]]
    logs = [path.read_text(encoding="utf-8").splitlines() for path in paths]
    assert len({json.loads(log[1])["loss"] for log in logs}) == 1


def test_the_projected_run_alone_says_what_it_clipped(demo: Demo, results: dict[str, Any]) -> None:
    for name in results["runs"]:
        lines = (demo.out / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        details = [each for each in map(json.loads, lines) if "alpha" in each]
        told = {key for each in details for key in ("directions", "share", "unseen") if key in each}
        assert details and len(told) == (3 if name == "adamw2-project" else 0)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_report_works_in_a_browser(demo: Demo, results: dict[str, Any], tmp_path: Path) -> None:
    report = (demo.out / "report.html").read_text(encoding="utf-8")
    pointed = tmp_path / "report.html"
    pointed.write_text(report.replace("</body>", POINT_AT_EVERY_CHART), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", pointed.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in run.stderr, run.stderr
    shown = run.stdout.rpartition("</script>")[2]
    charts = report.count('<svg class="chart"')
    assert charts == 1 + 2 * 9 + results["setting"]["model"]["layers"]
    assert shown.count("step ") == charts and "NaN" not in shown


def test_stopping_the_command_stops_its_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weyl_megatron.cli", "demo", "--out", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "adamw" / "log.jsonl"
    deadline = time.monotonic() + 600
    while not log.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    run.terminate()
    run.communicate(timeout=300)
    assert log.exists() and run.returncode == 130
    written = log.stat().st_size
    time.sleep(1)
    assert log.stat().st_size == written, "a worker still trains"
