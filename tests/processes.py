"""Runs a worker script on several real processes, with torchrun, gloo and the CPU, as a user
would.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(worker: Path, processes: int, *args: str, timeout: float = 900) -> str:
    """Run ``worker`` on ``processes`` processes and return what they printed; fail with its end if
    it fails.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""
    )
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [*command, str(worker), *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, (
        f"{worker.name} on {processes} processes failed:\n{run.stdout[-6000:]}"
    )
    return run.stdout
