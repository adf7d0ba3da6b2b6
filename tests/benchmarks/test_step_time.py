from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step_time
from benchmarks.models import MODELS, Shape
from tests.processes import ROOT


def test_models_have_the_parameters_of_the_paper() -> None:
    millions = {name: round(shape.count() / 1e6) for name, shape in MODELS.items()}
    # With 257 positions and 1000 classes.
    assert millions == {"gpt2-124m": 124, "gpt-774m": 774, "vit-g-1011m": 1013}


@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_one_command_writes_every_state_beside_every_peer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        step_time.MODELS, "tiny", Shape(kind, 2, 64, 256, vocabulary=300, context=32)
    )
    monkeypatch.setattr(step_time, "memory_beyond_adamw", lambda *_: 0.001)  # has a test of its own
    files = ["--json", str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]
    options = [
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--rounds",
        "3",
        "--tokens",
        "32",
        "--no-deepspeed",
    ]
    monkeypatch.setattr(sys, "argv", ["step_time", *options, *files])
    step_time.main()
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {row["state"] for row in rows} == {"inactive", "undecided", "clipped", "naive"}
    peers = {row["peer"] for row in rows}
    assert "torch.optim.AdamW(fused)" in peers
    assert "torch.optim.Muon" in peers or not hasattr(torch.optim, "Muon")
    numbers = {"seconds", "ratio", "bytes_per_second"}
    for row in rows:
        assert set(row) == {"device", "shape", "state", "peer"} | numbers
        assert row["seconds"] > 0 and row["ratio"] > 0 and row["bytes_per_second"] > 0
    table = (tmp_path / "x.md").read_text()
    assert "| AdamW², inactive |" in table and "| AdamW², naive |" in table
    assert "kernel 'cpu'" in table
    assert table.splitlines()[-1] in capsys.readouterr().out


def test_a_time_of_a_state_that_was_not_met_is_not_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(
        step_time.MODELS, "tiny", Shape("gpt", 1, 64, 256, vocabulary=300, context=32)
    )
    monkeypatch.setitem(step_time.RATES, "undecided", 1.0)
    monkeypatch.setattr(
        sys, "argv", ["step_time", "--device", "cpu", "--shapes", "tiny", "--no-deepspeed"]
    )
    with pytest.raises(RuntimeError, match="not every matrix is undecided"):
        step_time.main()


def test_adamw2_takes_less_than_half_a_percent_of_the_parameters_beyond_adamw() -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "gpt2-124m", "0", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    print(run.stdout)
    assert float(run.stdout.split()[-1]) < 0.005
