from __future__ import annotations

from pathlib import Path

import pytest

from weyl_megatron.demo import launch


def test_two_cpu_processes_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launch.choose_devices(None) == launch.Devices(2, gpu=False)
    assert launch.choose_devices(3) == launch.Devices(3, gpu=False)


def test_all_gpus_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert launch.choose_devices(None) == launch.Devices(4, gpu=True)
    assert str(launch.choose_devices(1)) == "1 GPU process"
    with pytest.raises(ValueError, match="--procs takes at most the number of GPUs, 4, got 5"):
        launch.choose_devices(5)


def test_what_an_earlier_demo_left_is_removed(tmp_path: Path) -> None:
    old = [tmp_path / "results.json", tmp_path / "report.html", tmp_path / "adamw" / "log.jsonl"]
    (tmp_path / "adamw").mkdir()
    for path in old:
        path.write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    launch.clear(tmp_path)
    assert not any(path.exists() for path in old) and (tmp_path / "mine.txt").exists()


def test_a_failure_is_told_by_its_exception(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(
        "noise\n[rank0]: Traceback\n[rank0]:   raise ValueError\n[rank0]: ValueError: tau takes …, "
        "got -1\nmore\n"
    )
    assert launch.cause(log) == "ValueError: tau takes …, got -1"
    log.write_text("noise\nImportError: no deepspeed\ntorch.elastic.ChildFailedError:\n")
    assert launch.cause(log) == "ImportError: no deepspeed"
    log.write_text("killed\ntorch.elastic.ChildFailedError:\n")
    assert launch.cause(log) == "no exception"
