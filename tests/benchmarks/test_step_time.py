from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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
    states = {"inactive", "undecided", "clipped", "naive", *step_time.PROJECTED}
    assert {row["state"] for row in rows} == states
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


def test_heats_hold_so_many_models_at_once_and_adamw_in_each() -> None:
    names = ["a", "b", "c", step_time.BASE, "d", "e"]
    assert step_time.heats(names, None) == [names]
    assert step_time.heats(names, 6) == [names]
    base = step_time.BASE
    assert step_time.heats(names, 3) == [[base, "a", "b"], [base, "c", "d"], [base, "e"]]


def test_a_ratio_is_taken_over_adamw_of_the_same_heat_and_no_more_models_are_held() -> None:
    """AdamW sleeps twice as long in the second heat, as beside a busy neighbour, and so does the
    other; their ratio is that of the first.
    """
    held: list[str] = []
    most = 0

    class Sleeper:
        def __init__(self, name: str) -> None:
            nonlocal most
            self.name = name
            held.append(name)
            most = max(most, len(held))
            # The first heat has begun where "b" was not made yet.
            self.seconds = {step_time.BASE: 0.02, "a": 0.04, "b": 0.08}[name]
            self.seconds *= 2 if name == step_time.BASE and self.made.count(name) else 1
            self.made.append(name)

        made: ClassVar[list[str]] = []

        def step(self) -> None:
            time.sleep(self.seconds)

        def __del__(self) -> None:
            held.remove(self.name)

    makers = {name: partial(Sleeper, name) for name in ("a", step_time.BASE, "b")}
    measured = step_time.race_in_heats(makers, 2, 1, torch.device("cpu"))
    assert most == 2 and list(measured) == list(makers)
    # Sleeps end late, by a millisecond or two of twenty.
    assert measured["a"].ratio == pytest.approx(2, rel=0.2)
    assert measured["b"].ratio == pytest.approx(2, rel=0.2)
    assert measured[step_time.BASE].ratio == 1


def test_what_one_model_took_is_written_before_the_next_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(
        step_time.MODELS, "tiny", Shape("gpt", 1, 64, 256, vocabulary=300, context=32)
    )
    measure = step_time.measure

    def interrupted(name: str, *rest: Any) -> Any:
        if name != "tiny":
            raise KeyboardInterrupt
        return measure(name, *rest)

    monkeypatch.setattr(step_time, "measure", interrupted)
    monkeypatch.setattr(step_time, "memory_beyond_adamw", lambda *_: 0.001)
    files = ["--json", str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]
    options = "--device cpu --shapes tiny gpt2-124m --rounds 1 --tokens 32 --no-deepspeed"
    monkeypatch.setattr(sys, "argv", ["step_time", *options.split(), "--contenders", "3", *files])
    with pytest.raises(KeyboardInterrupt):
        step_time.main()
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {row["shape"] for row in rows} == {"tiny"}
    states = {"inactive", "undecided", "clipped", "naive", *step_time.PROJECTED}
    assert {row["state"] for row in rows} == states
    assert "| AdamW², naive |" in (tmp_path / "x.md").read_text()


def test_fewer_than_two_contenders_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step_time", "--contenders", "1"])
    with pytest.raises(SystemExit):
        step_time.main()
    assert "--contenders got 1, it takes a whole number from 2 on" in capsys.readouterr().err


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


@pytest.mark.parametrize("clip", ["scale", "project"])
def test_adamw2_takes_less_than_half_a_percent_of_the_parameters_beyond_adamw(clip: str) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "gpt2-124m", "0", "cpu", clip]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    print(run.stdout)
    assert float(run.stdout.split()[-1]) < 0.005
