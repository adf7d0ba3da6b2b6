from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from weyl_megatron import __version__, doctor
from weyl_megatron.cli import main
from weyl_megatron.kernels import choice, cpu


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    for variable in ("DS_ACCELERATOR", "WEYL_MEGATRON", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(variable, raising=False)
    cpu.library.cache_clear()


def said(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, str]:
    assert main(["doctor"]) == status
    return {line[:19].strip(): line[19:] for line in capsys.readouterr().out.splitlines()}


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Only these packages are installed, torch and this one among them."""
    packages = {"weyl-megatron": "0.1.0", "torch": "2.14.1+cpu"}
    packages |= {name.replace("_", "-"): number for name, number in versions.items()}

    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(doctor, "version", version)


def test_it_names_versions_and_the_kernel_that_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys)
    assert all(lines[name][0].isdigit() for name in ("torch", "weyl-megatron", "Python"))
    assert lines["NCCL"][0].isdigit() or lines["NCCL"] == "not in this build of torch"
    assert lines["kernel, cpu"] == "cpu"
    assert lines["FSDP2, HSDP, TP"].startswith("ready (make AdamW2 after fully_shard and")
    assert lines["DeepSpeed adapter"] == 'ready ("type": "AdamW2")'
    assert lines["to mend"] == "nothing"


@pytest.mark.parametrize(
    ("value", "autoload", "line", "status"),
    [
        ("adamw2:tau=auto", "1", "Megatron's adam is AdamW2, tau='auto'", 0),
        ("taw=1", "1", "AdamW2: WEYL_MEGATRON got the option 'taw', it takes tau, ", 1),
        ("tau=0", "1", "AdamW2: WEYL_MEGATRON's tau got 0, it takes a number above 0 ", 1),
        ("adamw2", "0", "not read where TORCH_DEVICE_BACKEND_AUTOLOAD=0", 1),
    ],
)
def test_it_says_what_the_variable_for_megatron_asks_for(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    autoload: str,
    line: str,
    status: int,
) -> None:
    monkeypatch.setenv("WEYL_MEGATRON", value)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", autoload)
    lines = said(capsys, status)
    assert lines["WEYL_MEGATRON"].startswith(line)
    assert lines["to mend"] == ("WEYL_MEGATRON" if status else "nothing")


def test_gpus_are_counted_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_name",
        lambda number: ["NVIDIA H100", "NVIDIA H100", "NVIDIA A40"][number],
    )
    assert said(capsys)["GPUs"] == "2 × NVIDIA H100, 1 × NVIDIA A40"


def test_what_is_not_installed_comes_with_its_command_and_is_no_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    lines = said(capsys)
    assert lines["deepspeed"] == "not installed; pip install 'deepspeed>=0.16.9'"
    assert lines["megatron-core"] == "not installed; pip install 'megatron-core>=0.14'"
    assert lines["transformer-engine"].endswith(
        "pip install --no-build-isolation 'transformer-engine[pytorch]'"
    )
    assert lines["apex"].endswith("git+https://github.com/NVIDIA/apex")
    assert lines["Megatron adapter"] == "not ready: see megatron-core"


def test_an_engine_that_is_too_old_is_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, deepspeed="0.16.8+cu124", megatron_core="0.13.1rc2")
    lines = said(capsys, status=1)
    assert lines["deepspeed"] == (
        "takes 0.16.9 or newer, got 0.16.8+cu124; pip install --upgrade 'deepspeed>=0.16.9'"
    )
    assert lines["megatron-core"].endswith("pip install --upgrade 'megatron-core>=0.14'")
    assert lines["Megatron adapter"] == "not ready: see megatron-core"
    assert lines["to mend"] == "deepspeed; megatron-core"


@pytest.mark.parametrize(
    ("found", "tested"), [("0.16.9", True), ("0.19.9", True), ("0.20.0", False), ("1.0", False)]
)
def test_a_newer_engine_is_only_said_to_be_untested(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, found: str, tested: bool
) -> None:
    install(monkeypatch, deepspeed=found)
    assert said(capsys)["deepspeed"] == (
        found if tested else f"{found}, newer than 0.19, the newest that was tested"
    )


def test_megatrons_adapter_is_ready_with_megatron_core_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, megatron_core="0.16.1")
    for training, words in (
        (None, "comes with a checkout of Megatron-LM"),
        (object(), "megatron.training is installed"),
    ):
        specs = {"megatron": object(), "megatron.training": training}
        monkeypatch.setattr(doctor, "find_spec", specs.get)
        line = said(capsys)["Megatron adapter"]
        assert line.startswith("ready (python -m weyl_megatron.engines.megatron SCRIPT)")
        assert words in line


def test_an_adapter_that_is_not_ready_is_a_fault_where_there_is_deepspeed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.optim, "__getattr__", raising=False)
    monkeypatch.delattr(torch.optim, "AdamW2", raising=False)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    install(monkeypatch)
    assert said(capsys)["DeepSpeed adapter"].startswith("not ready: ")
    install(monkeypatch, deepspeed="0.19.8")
    lines = said(capsys, status=1)
    assert lines["DeepSpeed adapter"].endswith("; unset TORCH_DEVICE_BACKEND_AUTOLOAD")
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD")
    assert said(capsys, status=1)["DeepSpeed adapter"].endswith("; pip install it again")


def test_an_accelerator_that_is_not_there_is_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, deepspeed="0.19.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    line = said(capsys, status=1)["DS_ACCELERATOR"]
    assert line.endswith("got 'cuda'; export DS_ACCELERATOR=cpu")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert said(capsys)["DS_ACCELERATOR"] == "cpu"


def test_without_a_compiler_it_says_what_runs_instead_and_what_mends_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    line = said(capsys)["kernel, cpu"]
    assert line.startswith("torch, because there is no C++ compiler")
    assert "apt-get install g++" in line
    cpu.library.cache_clear()


@pytest.mark.parametrize("has_gpu", [False, True])
def test_without_what_builds_triton_s_launcher_it_says_what_runs_instead_and_what_mends_it(
    has_gpu: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    label, prefix = ("kernel, cuda", "torch, because ") if has_gpu else ("Triton's launcher", "")
    assert said(capsys)[label] == ("triton" if has_gpu else "can be built")
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o700)
    no_compiler = "apt-get install gcc, or name your C compiler in CC"
    for path, reason, mend in (
        (tmp_path / "none", "there is no C compiler", no_compiler),
        (compiler, f"{compiler} cannot build", "apt-get install python3-dev"),
    ):
        monkeypatch.setenv("CC", str(path))
        line = said(capsys)[label]
        assert line.startswith(prefix + reason) and line.endswith(mend)


def test_a_kernel_that_the_environment_asks_for_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert said(capsys)["kernel, cpu"] == "torch, because WEYL_MEGATRON_KERNEL says so"
    monkeypatch.setenv(choice.VARIABLE, "quick")
    assert "got 'quick', it takes one of" in said(capsys, status=1)["kernel, cpu"]


@pytest.mark.parametrize(
    ("engine", "status"), [("0.19.8", 0), ("0.16.8", 1)], ids=["it fits", "it is too old"]
)
def test_as_json_it_says_the_same_with_the_same_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str, status: int
) -> None:
    install(monkeypatch, deepspeed=engine)
    lines = said(capsys, status)
    assert main(["doctor", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["version", "lines"]
    assert report["version"] == __version__
    assert {line["label"]: line["text"] for line in report["lines"]} == lines
    unfit = [line["label"] for line in report["lines"] if not line["fits"]]
    assert unfit == (["deepspeed", "to mend"] if status else [])
