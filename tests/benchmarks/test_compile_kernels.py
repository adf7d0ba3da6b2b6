"""Triton's kernels, compiled for GPUs on a machine that has none."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks import compile_kernels  # noqa: E402
from weyl_megatron.kernels import triton_step  # noqa: E402
from weyl_megatron.kernels.choice import why_not  # noqa: E402

pytestmark = pytest.mark.skipif(
    "newer" in str(why_not("triton", "cuda", {torch.float32})),
    reason="the kernels take a newer Triton",
)


@triton.jit
def greedy(x):
    """Holds so many numbers at once that no registers are left."""
    at = tl.arange(0, 4096)
    a = tl.load(x + at)
    b = tl.load(x + 4096 + at)
    for number in range(8):
        a, b = tl.sqrt(b + number), a * b
        tl.debug_barrier()
    tl.store(x + at, a + tl.cumsum(b, 0))


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compile_kernels", *options])
    with pytest.raises(SystemExit) as status:
        compile_kernels.main()
    return int(status.value.code or 0)


def launch_too(monkeypatch: pytest.MonkeyPatch, launch: Callable[[], object]) -> None:
    """Have a step launch one kernel more."""
    monkeypatch.setattr(triton_step.TritonKernel, "release", lambda self: launch())


def operations(folder: Path, old: str, new: str) -> ModuleType:
    """Return triton_ops.py with another text in the place of one of its own."""
    text = Path(triton_step.ops.__file__).read_text()
    assert text.count(old) == 1
    path = folder / "changed_ops.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_s_front_end_takes_every_launch_of_a_step(arch: int) -> None:
    launches = compile_kernels.launches(arch)
    rows = [compile_kernels.front_end(launch) for launch in launches]
    assert [row for row in rows if row.error is not None] == []
    assert not compile_kernels.never_launched(launches)
    names = [row.kernel for row in rows]
    assert len(set(names)) == len(names), "one kernel is compiled twice: a first step waits for it"
    products = {" ".join(name.split()[1:3]) for name in names if name.startswith("products")}
    assert {f"BACK=True SOURCE={source}" for source in (0, 1)} <= products, "rows that ranks share"
    assert {f"BACK=False SOURCE={source}" for source in (0, 1, 2)} <= products
    assert sum(name.startswith("elementwise") for name in names) == 3  # step, undo, move


def test_a_constant_that_is_no_normal_float32_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton types what is below 2⁻¹²⁶ as float64, and U with it; its interpreter does not."""
    old = "(tl.sqrt(exp_avg_sq) * tl.load(hyper + 3) + tl.load(hyper + 4))"
    changed = operations(tmp_path, f"exp_avg / {old}", f"exp_avg / tl.maximum({old}, 1e-38)")
    monkeypatch.setattr(triton_step, "ops", changed)
    assert run(monkeypatch, "--arch", "90", "--front-end") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "does not compile" in line]
    assert any(line.startswith("| elementwise MODE=0") and "fp64" in line for line in failed)
    assert any(line.startswith("| products BACK=False SOURCE=2") for line in failed)


def test_a_kernel_that_nothing_launches_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_step.ops, "greedy", greedy, raising=False)
    assert run(monkeypatch, "--arch", "80", "--front-end") == 1
    assert "| greedy | 80 | never launched |" in capsys.readouterr().out


def test_a_kernel_that_spills_or_fits_nowhere_does_not_pass_and_the_json_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One launch more is found by itself, with its options."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    taken = compile_kernels.launches

    def only_greedy(arch: int) -> list[Any]:
        return [launch for launch in taken(arch) if launch.kernel is greedy]

    monkeypatch.setattr(compile_kernels, "launches", only_greedy)
    monkeypatch.setattr(compile_kernels, "never_launched", lambda launches: [])
    for options in ({"num_warps": 8}, {"num_warps": 4, "maxnreg": 32}):
        launch_too(monkeypatch, lambda options=options: greedy[(1,)](torch.zeros(8192), **options))
        status = run(monkeypatch, "--arch", "90", "--json", str(tmp_path / "x.json"))
        report = json.loads((tmp_path / "x.json").read_text())
        assert report["triton"] == triton.__version__
        assert report["torch"] == torch.__version__
        (row,) = report["kernels"]
        assert (row["kernel"], row["warps"]) == ("greedy", options["num_warps"])
        assert (row["spilled"] > 0) == ("maxnreg" in options) == (status == 1)
        assert "maxnreg" not in options or row["registers"] <= 32


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (32, 0, 4, 16),  # 64 warps
        (124, 16384, 4, 4),  # 128 registers of each of 128 threads
        (255, 256, 4, 2),
        (16, 0, 1, 32),  # programs
        (32, 100 << 10, 4, 2),  # bytes
        (32, 228 << 10, 4, 0),  # more than a program may have
    ],
)
def test_programs_a_multiprocessor(registers: int, shared: int, warps: int, programs: int) -> None:
    assert compile_kernels.programs_of(90, registers, shared, warps) == programs
