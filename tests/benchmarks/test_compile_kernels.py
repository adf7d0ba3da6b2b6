"""Triton's kernels, compiled for GPUs on a machine that has none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks import compile_kernels, launches  # noqa: E402
from weyl_megatron.kernels.choice import why_not  # noqa: E402
from weyl_megatron.kernels.triton_kernel import TritonKernel  # noqa: E402
from weyl_megatron.kernels.triton_step import adamw, products  # noqa: E402

pytestmark = pytest.mark.skipif(
    "newer" in str(why_not("triton", "cuda", {torch.float32})),
    reason="the kernels take a newer Triton",
)


@triton.jit
def denormal(exp_avg, exp_avg_sq, of_root, of_one):
    """U, with a constant below 2⁻¹²⁶."""
    return exp_avg / tl.maximum(tl.sqrt(exp_avg_sq) * of_root + of_one, 1e-38)


@triton.jit
def exchanged(
    grad,
    exp_avg,
    exp_avg_sq,
    of_grad,
    of_old,
    of_square,
    OF_M: tl.constexpr,
    OF_V: tl.constexpr,
):
    """The moments, with a sum over threads."""
    exp_avg += of_grad * (grad - exp_avg) + tl.sum(grad) * 0.0
    exp_avg_sq = exp_avg_sq * of_old + of_square * grad * grad
    return exp_avg.to(OF_M).to(tl.float32), exp_avg_sq.to(OF_V).to(tl.float32)


@triton.jit
def unaligned(pointers, buffer, which, offset, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """An address of which nothing is known."""
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return (tl.load(pointers + buffer * 4 + which) + offset * size).to(tl.pointer_type(DTYPE))


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
    monkeypatch.setattr(TritonKernel, "release", lambda self: launch())


def only(monkeypatch: pytest.MonkeyPatch, is_meant: Callable[[Any], bool]) -> None:
    """Have some of what is launched compiled."""
    taken = compile_kernels.launches

    def of_them(*options: Any) -> list[Any]:
        return [launch for launch in taken(*options) if is_meant(launch)]

    monkeypatch.setattr(compile_kernels, "launches", of_them)
    monkeypatch.setattr(compile_kernels, "never_launched", lambda launches: [])
    monkeypatch.setattr(compile_kernels, "ALL_DTYPES", (launches.FLOAT,))


@pytest.mark.parametrize(("arch", "width"), [(80, 4), (90, 4), (90, 16), (100, 8)])
def test_triton_s_front_end_takes_every_launch_of_a_step(arch: int, width: int) -> None:
    dtypes = launches.ALL_DTYPES if (arch, width) == (90, 4) else (launches.FLOAT,)
    launched = launches.launches(arch, width, dtypes)
    rows = [compile_kernels.front_end(launch) for launch in launched]
    assert [row for row in rows if row.error is not None] == []
    assert not launches.never_launched(launched)
    names = [row.kernel for row in rows]
    assert len(set(names)) == len(names), "one kernel is compiled twice: a first step waits for it"
    assert not [name for name in names if "not aligned" in name], "of these there are two"
    for first in ("FIRST=True", "FIRST=False"):
        of_width = [name for name in names if f"{first} BLOCK_W=4" in name]
        assert any(f"BLOCK_U={width} " in name for name in of_width)
    modes = {name.split()[1] for name in names if name.startswith("elementwise")}
    assert modes == {"MODE=0", "MODE=1", "MODE=2"}  # step, undo, move
    # The moments of gradients in all their dtypes.
    of_moments = [name for name in names if name.startswith("products FIRST=True")]
    assert len(of_moments) == len(dtypes)


@pytest.mark.skipif(not launches._TELLS_ALL, reason="this Triton's binder does not tell all")
def test_what_the_arguments_say_of_a_launch_is_what_triton_s_binder_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen() -> list[Any]:
        return sorted(
            (
                each.name,
                sorted(each.signature.items()),
                [k for k, v in each.attributes.items() if v],
            )
            for each in launches.launches(90)
        )

    bound = seen()
    monkeypatch.setattr(launches, "_TELLS_ALL", False)
    assert seen() == bound


def test_a_constant_that_is_no_normal_float32_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton types what is below 2⁻¹²⁶ as float64, and U with it; its interpreter does not."""
    for module in (adamw, products):
        monkeypatch.setattr(module, "direction", denormal)
    assert run(monkeypatch, "--arch", "90", "--front-end") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "does not compile" in line]
    assert any(line.startswith("| elementwise MODE=0") and "fp64" in line for line in failed)
    assert any(line.startswith("| products FIRST=False") for line in failed)


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("moments", exchanged, "BAR.SYNC"),
        ("address", unaligned, "LDG.E"),
    ],
)
def test_a_pass_that_exchanges_or_loads_narrowly_in_its_loop_does_not_pass(
    name: str,
    fault: Any,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Triton remembers the key of a function that it has seen, faults or not.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(adamw, name, fault)
    only(monkeypatch, lambda launch: launch.name.startswith("elementwise MODE=0"))
    assert run(monkeypatch, "--arch", "90", "--jobs", "1") == 1
    faults = capsys.readouterr().out.split("**")[1]
    assert said in faults and "in 'for start in range(0, body, WIDE):'" in faults


def test_a_kernel_that_nothing_launches_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adamw, "greedy", greedy, raising=False)
    monkeypatch.setattr(compile_kernels, "ALL_DTYPES", (launches.FLOAT,))
    assert run(monkeypatch, "--arch", "80", "--front-end") == 1
    assert "| greedy | 80 | never launched |" in capsys.readouterr().out


def test_a_kernel_that_spills_or_fits_nowhere_does_not_pass_and_the_json_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One launch more is found by itself, with its options."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    only(monkeypatch, lambda launch: launch.kernel is greedy)
    for options in ({"num_warps": 8}, {"num_warps": 4, "maxnreg": 32}):
        launch_too(monkeypatch, lambda options=options: greedy[(1,)](torch.zeros(8192), **options))
        status = run(monkeypatch, "--arch", "90", "--json", str(tmp_path / "x.json"))
        report = json.loads((tmp_path / "x.json").read_text())
        assert report["triton"] == triton.__version__
        assert report["torch"] == torch.__version__
        (row,) = report["kernels"]
        assert (row["kernel"], row["warps"]) == ("greedy", options["num_warps"])
        assert (row["spilled"] > 0) == ("maxnreg" in options) == (status == 1)
        assert any("spilled" in fault for fault in row["faults"]) == (status == 1)
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
