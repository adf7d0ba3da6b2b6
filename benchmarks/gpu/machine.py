"""What there is (`env`), whether the kernels compile for it (`warm`), and pass their tests there
(`cuda`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import ROOT, Failed, NotRun, Stop, Task, result

_PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "timm", "tokenizers", "pytest")
_TOOLS = "gcc", "clang", "g++", "nvcc", "nvidia-smi"

#: What the kernels are typed for where there is no GPU: an H200.
_ARCH = 90


def env(task: Task) -> None:
    """Versions, the GPU, how fast it copies, and what the doctor says."""
    result(
        "versions", python=sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}
    )
    result("tools", cores=os.cpu_count(), **{name: shutil.which(name) for name in _TOOLS})
    if task.is_gpu:
        if not torch.cuda.is_available():
            raise Stop("torch sees no GPU (--device cpu --tiny tries what a CPU can)")
        gpu = torch.cuda.get_device_properties(0)
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        result(
            "gpu",
            gpu=gpu.name,
            capability=capability,
            multiprocessors=gpu.multi_processor_count,
            gib=round(gpu.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
            nccl=".".join(map(str, torch.cuda.nccl.version())),
        )
    count = 10**6 if task.tiny else 5 * 10**8
    source, target = torch.randn(count, device=task.device), torch.empty(count, device=task.device)
    seconds = task.seconds(lambda: target.copy_(source), 20)
    result("copy", gb_per_s=round(2 * source.nbytes / seconds / 1e9, 1))
    command = [sys.executable, "-m", "weyl_megatron.cli", "doctor", "--json"]
    doctor = subprocess.run(command, capture_output=True, text=True, check=False)
    print(doctor.stdout, doctor.stderr)
    lines = {line["label"]: line["text"] for line in json.loads(doctor.stdout)["lines"]}
    result("doctor", status=doctor.returncode, **lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warm(task: Task) -> None:
    """Compile every variant of every kernel that a step launches, side by side, into Triton's
    cache; on a CPU only type them.
    """
    # Not at the top: it needs Triton, which the other parts run without.
    from benchmarks.compile_kernels import MULTIPROCESSORS, compiled, front_end
    from benchmarks.launches import launches

    if not task.is_gpu:
        rows = [front_end(launch) for launch in launches(_ARCH)]
        wrong = [row.kernel for row in rows if row.error is not None]
        result("typed", arch=_ARCH, variants=len(rows), wrong=wrong)
        if wrong:
            raise Stop(f"Triton's front end refuses {len(wrong)} of {len(rows)} kernels")
        return
    # Processes that are forked may not use CUDA if this one has: it asks in another.
    (arch,) = _forked(lambda _: torch.cuda.get_device_capability(), [0], 1)
    number = 10 * arch[0] + arch[1]
    if number not in MULTIPROCESSORS:
        known = ", ".join(map(str, MULTIPROCESSORS))
        raise NotRun(f"benchmarks.compile_kernels knows sm {known}, not {number}")
    launched = launches(number)
    errors, spilled = [], []
    for row in _forked(
        lambda at: compiled(launched[at]), range(len(launched)), os.cpu_count() or 1
    ):
        result("compiled", **row._asdict())
        if row.error is not None:
            errors.append(row.kernel)
        elif not row.passes:
            spilled.append(row.kernel)
    result("warm", arch=number, variants=len(launched), errors=errors, spilled=spilled)
    if errors:
        raise Stop(f"{len(errors)} of {len(launched)} variants do not compile")
    if spilled:
        raise Failed(
            f"{len(spilled)} of {len(launched)} variants spill or fit on no multiprocessor"
        )


_work: Callable[[Any], Any]


def _forked(work: Callable[[Any], Any], inputs: Any, processes: int) -> Iterator[Any]:
    """Yield what ``work`` makes of each input, in forked processes, as they are done: a launch
    cannot be pickled.
    """
    global _work
    _work = work
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done in as_completed([pool.submit(_do, each) for each in inputs]):
            yield done.result()


def _do(each: Any) -> Any:
    return _work(each)


def cuda(task: Task) -> None:
    """tests/kernels/test_cuda.py, each test as JUnit has it."""
    if not task.is_gpu:
        raise NotRun("no GPU")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        file = ROOT / "tests/kernels/test_cuda.py"
        run = subprocess.run([*command, f"--junitxml={report}", str(file)], cwd=ROOT, check=False)
        if not report.exists():
            raise Failed(f"pytest ended with {run.returncode} and no report")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = 0
    for case in cases:
        problems = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        bad += bool(problems)
        result(
            "test",
            test=case.get("name"),
            status=problems[0] if problems else "passed",
            seconds=float(case.get("time", "nan")),
        )
    if bad or not cases:
        raise Failed(f"{bad} of {len(cases)} tests did not pass")
