"""What `weyl-megatron demo` does: starts the worker under torchrun, shows its progress, reports."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .progress import Progress
from .recipe import RUNS
from .report import write_report
from .results import Results, claims, load_results, summary, table

CPU_PROCESSES = 2
POLL_SECONDS = 0.2
EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")


@dataclass(frozen=True)
class Devices:
    """What the worker runs on."""

    processes: int
    gpu: bool

    def __str__(self) -> str:
        kind = "GPU" if self.gpu else "CPU"
        return f"{self.processes} {kind} process{'es' if self.processes > 1 else ''}"


def run_demo(out: Path, steps: int, seed: int, processes: int | None) -> int:
    """Trains the five runs and reports; returns 0 if the claims hold of the numbers, else 1."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RuntimeError(
            "the demo takes DeepSpeed, got none installed: pip install 'weyl-megatron[demo]'"
        )
    devices = choose_devices(processes)
    clear(out)
    print(f"{len(RUNS)} runs of {steps} steps under DeepSpeed ZeRO-2, {devices}, logs in {out}\n")
    train(out, steps, seed, devices)
    return conclude(out)


def choose_devices(processes: int | None) -> Devices:
    """All GPUs, or two CPU processes; `processes` says how many of them."""
    import torch

    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if gpus and processes and processes > gpus:
        raise ValueError(f"--procs takes at most the number of GPUs, {gpus}, got {processes}")
    return Devices(processes or gpus or CPU_PROCESSES, gpu=gpus > 0)


def clear(out: Path) -> None:
    """Makes `out` and removes what an earlier demo left there."""
    out.mkdir(parents=True, exist_ok=True)
    logs = [out / run.name / "log.jsonl" for run in RUNS]
    for path in [*logs, out / "setting.json", out / "results.json", out / "report.html"]:
        path.unlink(missing_ok=True)


def train(out: Path, steps: int, seed: int, devices: Devices) -> None:
    """Runs the worker to its end, drawing progress; an interrupt or an error here ends it, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={devices.processes}", "-m", "weyl_megatron.demo.train"]
    command += [f"--out={out}", f"--steps={steps}", f"--seed={seed}"]
    progress = Progress(out, steps, sys.stdout)
    with (out / "worker.log").open("w", encoding="utf-8") as log:
        # A session of its own, so that Ctrl-C reaches the worker once: by the `finally` here.
        worker = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(devices),
            start_new_session=True,
        )
        try:
            while worker.poll() is None:
                progress.update()
                time.sleep(POLL_SECONDS)
            progress.update()
        finally:
            progress.close()
            stop(worker)
    if worker.returncode:
        path = out / "worker.log"
        raise RuntimeError(f"the worker failed with {cause(path)}, see {path}")


def environment(devices: Devices) -> dict[str, str]:
    """The worker's environment; without GPUs it says so to DeepSpeed, which would look for one."""
    own = {} if devices.gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # The autoload of torch's plugins is how DeepSpeed finds AdamW2 by its name.
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", **own}


def cause(log: Path) -> str:
    """The first exception in the worker's log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [match[1] for match in map(EXCEPTION.match, lines) if match]
    # torchrun's ChildFailedError names no reason.
    reasons = [error for error in errors if "ChildFailedError" not in error]
    return reasons[0] if reasons else "no exception"


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Ends the worker and waits for it; torchrun ends its own processes when it is told to."""
    if worker.poll() is None:
        worker.send_signal(signal.SIGTERM)
        worker.wait()


def conclude(out: Path) -> int:
    """Prints the table and the claims, writes `results.json` and the report."""
    results = load_results(out)
    text = json.dumps(summary(results), indent=2, ensure_ascii=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    write_report(results, out / "report.html")
    print(f"\n{table(results)}\n")
    return verdict(results, out)


def verdict(results: Results, out: Path) -> int:
    """Prints each claim with its verdict; the exit status says whether all hold."""
    judged = claims(results)
    for claim in judged:
        print(f"{'✓' if claim.holds else '✗'} {claim.text}")
    print(f"\nThe report: {out / 'report.html'}")
    failed = [claim.text for claim in judged if not claim.holds]
    if failed:
        print(f"weyl-megatron demo: not met: {'; '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0
