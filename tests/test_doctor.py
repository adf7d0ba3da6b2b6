from __future__ import annotations

from pathlib import Path

import pytest

from weyl_megatron.cli import main
from weyl_megatron.kernels import choice, cpu


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    cpu.library.cache_clear()


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["doctor"]) == 0
    return {line[:19].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}


def test_it_names_versions_and_the_kernel_that_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys)
    assert lines["torch"][0].isdigit() and lines["weyl-megatron"][0].isdigit()
    assert lines["kernel, cpu"] == "cpu"
    assert lines["DeepSpeed's door"].startswith("open")


def test_without_a_compiler_it_says_what_runs_instead_and_what_mends_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    line = said(capsys)["kernel, cpu"]
    assert line.startswith("torch, because there is no C++ compiler") and "apt-get install g++" in line
    cpu.library.cache_clear()


def test_a_kernel_that_the_environment_asks_for_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert said(capsys)["kernel, cpu"] == "torch, because WEYL_MEGATRON_KERNEL says so"
    monkeypatch.setenv(choice.VARIABLE, "quick")
    assert "got 'quick', it takes one of" in said(capsys)["kernel, cpu"]
