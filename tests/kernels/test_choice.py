from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import ROOT
from tests.selection import values_of
from weyl_megatron import AdamW2
from weyl_megatron.environment import say_once
from weyl_megatron.kernels import choice, cpu


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled, nothing said yet, no wish in the environment."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    cpu.library.cache_clear()
    say_once.cache_clear()
    choice._trouble_of.cache_clear()
    yield
    cpu.library.cache_clear()


def stepped(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdamW2, nn.Parameter]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(9, 7, dtype=dtype))
    optimizer = AdamW2([("w", weight)], lr=0.1, **options)
    for _ in range(2):
        weight.grad = torch.randn(9, 7).to(dtype)
        optimizer.step()
    return optimizer, weight


def kernel_of(optimizer: AdamW2) -> str:
    return next(iter(optimizer._matrix_groups))._step._kernel.name


def test_float32_on_the_cpu_is_stepped_in_compiled_code() -> None:
    assert kernel_of(stepped()[0]) == "cpu"


@pytest.mark.parametrize("compiler", ["missing", "failing"])
def test_without_a_working_compiler_the_plain_path_steps_and_says_so_once(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = stepped()
    failing = fake_compiler(tmp_path, "no such target", 1)
    monkeypatch.setenv("CXX", str(failing if compiler == "failing" else tmp_path / "none"))
    cpu.library.cache_clear()
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        optimizer, weight = stepped()
        stepped()
    assert kernel_of(optimizer) == "torch"
    assert len(caplog.records) == 1
    reason = "no C++ compiler" if compiler == "missing" else "no such target"
    assert "plain torch, not in the fused kernel 'cpu'" in caplog.text and reason in caplog.text
    assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)  # roundings of two steps


def test_a_c_compiler_that_cxx_names_builds_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT's BOFT leaves the environment where it cannot build its extension: CC and CXX are
    "gcc".
    """
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    monkeypatch.setenv("CXX", "gcc")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu.library.cache_clear()
    try:
        assert kernel_of(stepped()[0]) == "cpu"
        assert list(tmp_path.rglob("cpu_step-*.so"))
    finally:
        cpu.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_that_the_kernel_does_not_take_is_stepped_by_the_plain_path(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        optimizer, weight = stepped(dtype)
    assert kernel_of(optimizer) == "torch" and f"it takes torch.float32, not {dtype}" in caplog.text
    assert weight.isfinite().all()


def test_infinite_tau_is_torch_s_adamw_and_takes_plain_torch() -> None:
    assert kernel_of(stepped(tau=float("inf"))[0]) == "torch"


def test_a_wish_that_cannot_be_granted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(
        ValueError, match="WEYL_MEGATRON_KERNEL got 'fast', it takes one of torch, cpu, triton"
    ):
        stepped()
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    with pytest.raises(
        ValueError, match="WEYL_MEGATRON_KERNEL got 'cpu', but it takes torch\\.float32, not"
    ):
        stepped(torch.float64)
    monkeypatch.setenv(choice.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="got 'triton', but it takes tensors on a GPU, not on cpu"):
        stepped()


def test_without_triton_a_gpu_s_tensors_are_stepped_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        assert choice.pick_name("cuda", {torch.float32}) == "torch"
    assert "plain torch, not in the fused kernel 'triton'" in caplog.text


@pytest.mark.parametrize(
    ("version", "is_interpreted", "oldest"),
    [
        ("3.0.0", False, "3.1"),
        ("3.1.0", False, None),
        ("3.10.0+git1", False, None),
        ("3.4.0", True, "3.5"),
        ("3.5.0", True, None),
        ("3.10.0+git1", True, None),
    ],
)
def test_a_triton_that_is_too_old_for_the_kernels_is_left_alone(
    version: str,
    is_interpreted: bool,
    oldest: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The interpreter of older ones does not give what plain torch gives."""
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    monkeypatch.setattr(choice, "why_no_launcher", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if is_interpreted else "0")
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        name = choice.pick_name("cuda", {torch.float32})
    assert name == ("triton" if oldest is None else "torch")
    sentence = f"it takes Triton {oldest} or newer, not {version}"
    assert (sentence in caplog.text) == (name == "torch")


@pytest.mark.parametrize(
    ("dtypes", "others"),
    [
        ((torch.float32,), ""),
        ((torch.bfloat16,), ""),
        ((torch.float32, torch.bfloat16), ""),
        ((torch.float64,), "torch.float64"),
        ((torch.float32, torch.float16), "torch.float16"),
    ],
    ids=str,
)
def test_weights_that_triton_s_kernels_take(
    dtypes: tuple[torch.dtype, ...], others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "why_no_launcher", lambda: None)
    reason = choice.why_not("triton", "cuda", dtypes)
    if others:
        assert reason == f"it takes torch.float32 and torch.bfloat16, not {others}"
    else:
        assert reason is None


def fake_compiler(folder: Path, says: str, status: int) -> Path:
    fake = folder / "gcc"
    fake.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {status}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return fake


def test_without_a_c_compiler_for_triton_s_launcher_plain_torch_steps_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an image with no gcc: Triton would raise at its first launch, in the middle of a
    step.
    """
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    working = shutil.which("gcc") or shutil.which("clang")
    assert choice.pick_name("cuda", {torch.float32}) == "triton"
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        assert [choice.pick_name("cuda", {torch.float32}) for _ in range(2)] == ["torch", "torch"]
    assert len(caplog.records) == 1
    assert (
        "plain torch, not in the fused kernel 'triton': there is no C compiler for" in caplog.text
    )
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with pytest.raises(ValueError, match="got 'triton', but there is no C compiler"):
        choice.pick_name("cuda", {torch.float32})
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which launches nothing
    assert choice.pick_name("cuda", {torch.float32}) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CC", str(working))
    assert choice.pick_name("cuda", {torch.float32}) == "triton"
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))  # CC goes before the others, there or not
    monkeypatch.setenv("PATH", str(Path(str(working)).parent))
    assert "no C compiler" in str(choice.why_not("triton", "cuda", {torch.float32}))


@pytest.mark.parametrize(
    ("says", "status", "name"),
    [
        ("launcher.c:1:10: fatal error: Python.h: No such file", 1, "torch"),
        ("a warning", 0, "triton"),
    ],
)
def test_a_c_compiler_that_cannot_build_the_launcher_is_none(
    says: str,
    status: int,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", str(fake_compiler(tmp_path, says, status)))
    with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
        assert choice.pick_name("cuda", {torch.float32}) == name
    assert (
        ("cannot build Triton's launcher" in caplog.text) == (says in caplog.text) == (status == 1)
    )


def test_a_gradient_or_state_of_another_dtype_is_refused() -> None:
    optimizer, weight = stepped()
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].double()
    with pytest.raises(
        ValueError,
        match=r"'exp_avg' of parameter '\S+' is \(9, 7\), torch.float64, .* takes its parameter's",
    ):
        optimizer.step()


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_a_gradient_does_not_outlive_the_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, kernel)
    optimizer, weight = stepped()
    gone = weakref.ref(weight.grad)
    weight.grad = None
    assert optimizer.stats() and gone() is None, "its memory is missing in the next backward pass"


def test_a_header_that_changed_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\ntouch "$last"\n')
    compiler.chmod(0o700)
    source = tmp_path / cpu._SOURCE.name
    shutil.copy(cpu._SOURCE, source)
    shutil.copytree(cpu._SOURCE.with_suffix(""), source.with_suffix(""))
    monkeypatch.setattr(cpu, "_SOURCE", source)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    headers = sorted(source.with_suffix("").iterdir())
    assert {header.name for header in headers} >= {"algebra.h", "products.h", "vector.h"}
    built = [cpu.build()]
    for header in headers:
        with header.open("a") as file:
            file.write("// changed\n")
        built.append(cpu.build())
    assert len(set(built)) == len(headers) + 1 and cpu.build() == built[-1]


def test_the_number_of_threads_is_no_other_arithmetic() -> None:
    """Ranks may have other numbers of threads, and share a matrix."""
    before = torch.get_num_threads()
    try:
        numbers = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cpu.arithmetic.cache_clear()
            numbers.add(cpu.arithmetic())
    finally:
        torch.set_num_threads(before)
    assert len(numbers) == 1


def test_code_is_not_loaded_from_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = cpu.cache_folder()
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
    folder.chmod(0o777)
    with pytest.raises(OSError, match="can be written by others"):
        cpu.cache_folder()
    folder.chmod(0o700)
    assert cpu.library()
    assert [path.suffix for path in folder.iterdir()] == [".so"], "something is left behind"


#: The optimizer's own tests with every other kernel, and the kernels' tests with Triton's, whose
#: interpreter takes a second where a GPU takes none, and has to be there from the start of a
#: process. By name: the kernel, and what pytest is told.
OTHERS = {
    "plain torch, the optimizer": (
        "torch",
        ["tests/test_optimizer.py", "tests/test_state_dict.py"],
    ),
    "triton, whole runs": ("triton", ["tests/kernels/test_runs.py"]),
    "triton, its steps": (
        "triton",
        ["tests/kernels/test_triton.py", "tests/kernels/test_triton_values.py"],
    ),
    "triton, singular values": ("triton", ["tests/kernels/test_triton_project.py"]),
    "triton, moments in other dtypes": ("triton", ["tests/kernels/test_kept_moments.py"]),
    "triton, spread matrices": (
        "triton",
        ["tests/kernels/test_ranks.py", "tests/kernels/test_sure_steps.py"],
    ),
    "triton, the optimizer": (
        "triton",
        [
            "tests/test_optimizer.py",
            "-k",
            "stats_say or experts or not_finite or vectors_take or overrides or moves",
        ],
    ),
}


@pytest.fixture(scope="module")
def others(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All that are tested at once, beside each other."""
    runs = {}
    for name in OTHERS.keys() & values_of(request, "name"):
        kernel, tests = OTHERS[name]
        environment = {
            **os.environ,
            choice.VARIABLE: kernel,
            "TEST_KERNEL": kernel,
            "TRITON_INTERPRET": "1",
        }
        if tests[0].startswith("tests/kernels/"):
            del environment[choice.VARIABLE]  # they choose for themselves
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        runs[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield runs
    for run in runs.values():
        run.kill()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if kernel == "triton" else ())
        for name, (kernel, _) in OTHERS.items()
    ],
)
def test_every_kernel_passes_the_optimizer_s_tests(
    name: str, others: dict[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if OTHERS[name][0] == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        reason = choice.why_not("triton", "cpu", {torch.float32})
        if reason is not None:
            pytest.skip(reason)
    output, _ = others[name].communicate(timeout=2700)
    assert others[name].returncode == 0, output[-6000:]
    assert " passed" in output
