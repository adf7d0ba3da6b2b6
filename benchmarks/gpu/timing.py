"""What a step takes: launches, device and host milliseconds (`profile`), and benchmarks.step_time
per model (`step124`, `step774`, `stepg`), beside what the cost model says.
"""

from __future__ import annotations

import importlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks.gpu.part import ROOT, Failed, Task, result
from benchmarks.models import MODELS
from benchmarks.step_time import BASE, RATES, STD, TAU, check_states
from weyl_megatron import AdamW2

#: What is shown of the kernels that take longest, and how often each step is timed.
_MOST, _TIMES = 12, 9

#: Copies of a model that step_time holds at once, within 80 GB: one of ViT-g is 12 bytes for each
#: of 1013 million parameters, beside 4 bytes for the gradients that they share: 53 GB.
_CONTENDERS = 4

Estimate = Callable[[str, str], Mapping[str, tuple[float, float]]]


def profile(task: Task) -> None:
    """GPT-2 124M, 148 parameters, in the three states, and fused AdamW."""
    named = MODELS["gpt2-124m"].parameters(1 if task.tiny else None)
    generator = torch.Generator(task.device).manual_seed(0)
    grads = {
        name: torch.randn(shape, generator=generator, device=task.device) * 1e-3
        for name, shape in named
    }

    def weights() -> dict[str, nn.Parameter]:
        made = {
            name: nn.Parameter(torch.randn(shape, generator=generator, device=task.device) * STD)
            for name, shape in named
        }
        for name, parameter in made.items():
            parameter.grad = grads[name]
        return made

    makers: dict[str, Callable[[], Optimizer]] = {
        state: lambda rate=rate: AdamW2(weights().items(), lr=rate, tau=TAU)  # type: ignore[misc]
        for state, rate in RATES.items()
    }
    makers[BASE] = lambda: torch.optim.AdamW(weights().values(), lr=1e-6, fused=True)
    for name, make in makers.items():
        optimizer = make()
        numbers = _step_of(task, optimizer)
        if isinstance(optimizer, AdamW2):
            check_states({name: optimizer})
        result("step", contender=name, parameters=len(named), **numbers)


def _step_of(task: Task, optimizer: Optimizer) -> dict[str, Any]:
    """Return what a step in the steady state takes."""
    task.synchronize()
    start = time.perf_counter()
    optimizer.step()
    task.synchronize()
    first = time.perf_counter() - start
    host, total = [], []
    for turn in range(_TIMES + 3):
        task.synchronize()
        start = time.perf_counter()
        optimizer.step()
        returned = time.perf_counter()
        task.synchronize()
        if turn >= 3:
            host.append(returned - start)
            total.append(time.perf_counter() - start)
    measured = {
        "first_s": round(first, 3),
        "host_ms": round(statistics.median(host) * 1e3, 3),
        "total_ms": round(statistics.median(total) * 1e3, 3),
    }
    if not task.is_gpu:
        return measured
    with profiler(activities=[ProfilerActivity.CUDA]) as trace:
        optimizer.step()
        task.synchronize()
    taken: dict[str, list[float]] = {}  # milliseconds of each launch, by kernel
    for event in trace.events() or []:
        # Of the step as a whole the profiler has an event, too.
        if event.device_type.name == "CUDA" and not event.name.startswith("Optimizer.step#"):
            taken.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    most = sorted(taken.items(), key=lambda item: -sum(item[1]))[:_MOST]
    return {
        **measured,
        "device_ms": round(sum(map(sum, taken.values())), 4),
        **counts({name: len(each) for name, each in taken.items()}),
        "most": [[name[:70], len(each), round(sum(each), 4)] for name, each in most],
    }


def counts(launches: Mapping[str, int]) -> dict[str, int]:
    """Return how many launches are copies or fills, torch's kernels, and others: Triton's, and a
    library's.

    They are told by their names: torch's, of C++, have colons, angle brackets or parentheses.
    """
    kinds = {"copies": 0, "torch_launches": 0, "other_launches": 0}
    for name, number in launches.items():
        if re.match(r"Memcpy|Memset", name):
            kinds["copies"] += number
        elif re.search(r"[:<(]", name):
            kinds["torch_launches"] += number
        else:
            kinds["other_launches"] += number
    return kinds


def step124(task: Task) -> None:
    """GPT-2 124M."""
    _step_time(task, "gpt2-124m")


def step774(task: Task) -> None:
    """GPT 774M."""
    _step_time(task, "gpt-774m")


def stepg(task: Task) -> None:
    """ViT-g."""
    _step_time(task, "vit-g-1011m")


def _step_time(task: Task, model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows, table = Path(folder) / "rows.json", Path(folder) / "table.md"
        command = [sys.executable, "-m", "benchmarks.step_time", "--device", task.device]
        command += ["--shapes", model, "--contenders", str(_CONTENDERS), "--no-deepspeed"]
        command += ["--rounds", "1" if task.tiny else "9"]
        if task.tiny:  # Muon's bfloat16 takes a CPU that has none a minute a step
            command += ["--millions", "8", "--tokens", "64", "--only", *RATES, "projected", "naive"]
        command += ["--json", str(rows), "--markdown", str(table)]
        run = subprocess.run(command, cwd=ROOT, check=False)
        if run.returncode:
            raise Failed(f"benchmarks.step_time ended with {run.returncode}")
        with (task.out / "step_time.md").open("a") as file:
            file.write(table.read_text() + "\n")
        measured = json.loads(rows.read_text())
    milliseconds = {row["state"]: row["seconds"] * 1e3 for row in measured}
    result(
        "step_time",
        model=model,
        ms={state: round(each, 4) for state, each in milliseconds.items()},
        ratio_to_adamw={
            row["state"]: round(row["ratio"], 3) for row in measured if row["peer"] == BASE
        },
        muon_to_clipped=[
            round(1 / row["ratio"], 2)
            for row in measured
            if row["state"] == "clipped" and "Muon" in row["peer"]
        ],
    )
    if task.is_gpu:
        result("cost model", model=model, **_estimated(model, milliseconds))


def _estimated(model: str, milliseconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the cost model's bounds beside what was measured, or why there are none."""
    try:
        estimate: Estimate = importlib.import_module("benchmarks.cost_model").estimate
    except ModuleNotFoundError as error:
        return {"not run": str(error)}
    device = torch.cuda.get_device_name()
    gpu = gpu_of(device)
    if gpu is None:
        return {"not run": f"it knows no {device}"}
    return beside(estimate(model, gpu), milliseconds)


def gpu_of(device: str) -> str | None:
    """Return the cost model's name of a GPU that torch names, or None."""
    return next((name for name in ("h200", "h100", "a100") if name.upper() in device.upper()), None)


def beside(
    bounds: Mapping[str, tuple[float, float]], milliseconds: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return, per state, the bounds, what was measured, and by what share it is beyond the nearer
    bound: 0 between them, negative below.
    """
    rows = {}
    for state, (lower, upper) in bounds.items():
        if state in milliseconds:
            measured = milliseconds[state]
            error = measured / min(max(measured, lower), upper) - 1
            rows[state] = {
                "lower_ms": round(lower, 4),
                "upper_ms": round(upper, 4),
                "measured_ms": round(measured, 4),
                "error": round(error, 4),
            }
    return rows
