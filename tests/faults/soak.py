"""A soak: a run under ZeRO-3 that is stopped, killed, resumed and resized at random, beside one
that is left alone.

    python -m tests.faults.soak            2,000 steps at 3 ranks: about 10 minutes on 2 cores

Exits with 1 where a loss differs before the first resize, by more than 1e-3 after it; where ranks
do not agree on the weights; where memory grows by more than 5 % after the first 200 steps of a
process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.processes import ROOT

WORKER = Path(__file__).with_name("soak_worker.py")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    args = parser.parse_args(arguments)
    found = soak(args.steps, args.seed, args.out)
    for key, value in found.items():
        print(f"{key}: {value}")
    return int(not passes(found))


def passes(found: dict[str, Any]) -> bool:
    return bool(
        found["differences before the first resize"] == 0
        and found["largest relative difference"] < 1e-3
        and found["checks on which ranks disagreed"] == 0
        and found["largest growth of memory"] < 0.05
    )


def soak(steps: int, seed: int, out: Path) -> dict[str, Any]:
    """Make both runs and compare them."""
    shutil.rmtree(out, ignore_errors=True)
    calm, rough = out / "calm", out / "rough"
    for folder in (calm, rough):
        folder.mkdir(parents=True)
    segment(calm, steps, steps, "none", 3)
    events = disturb(rough, steps, random.Random(seed))
    return compare(calm, rough, events)


def disturb(out: Path, steps: int, dice: random.Random) -> list[tuple[int, str]]:
    """Train in pieces; return what was done, and after which step."""
    events: list[tuple[int, str]] = []
    done, ranks, load = 0, 3, "none"
    while done < steps:
        until = min(steps, done + dice.randrange(max(2, steps // 20), max(4, steps // 7)))
        kind = dice.choice(["stop", "kill", "resize"])
        if kind == "kill":
            segment(out, steps, steps, load, ranks, kill_after=until, victim=dice.randrange(ranks))
        else:
            segment(out, until, steps, load, ranks)
        before, done = done, newest(out)
        if (
            done > before
        ):  # else the run was killed before its first save, and starts from where it started
            load = "rigid"
        if kind == "resize" and done < steps:
            ranks = dice.choice([one for one in (1, 2, 3) if one != ranks]) if ranks == 3 else 3
            convert(out)
            load = "universal"
            kind = f"resize to {ranks}"
        if done < steps:
            events.append((done, kind))
    return events


def segment(
    out: Path,
    last: int,
    total: int,
    load: str,
    ranks: int,
    *,
    kill_after: int | None = None,
    victim: int = 0,
) -> None:
    """Train up to step `last`; with `kill_after`, kill a rank once that step is logged, and with it
    the run.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
    before = len(read(out))
    with (out / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [*command, str(WORKER), str(out), str(last), str(total), load],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while kill_after is not None and process.poll() is None:
            records = read(out)
            if len(records) > before and records[-1]["step"] >= kill_after:
                os.kill(workers_of(process.pid)[victim], signal.SIGKILL)
                break
            time.sleep(0.02)
        status = process.wait(timeout=3600)
    if kill_after is None and status:
        sys.exit(f"soak: {' '.join(command)} failed:\n{(out / 'output.txt').read_text()[-4000:]}")


def workers_of(launcher: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True
    )
    return sorted(map(int, listed.stdout.split()))


def newest(out: Path) -> int:
    latest = out / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step")) if latest.is_file() else 0


def convert(out: Path) -> None:
    """DeepSpeed's own conversion of the newest checkpoint to its universal format."""
    step = newest(out)
    folder = out / "checkpoints" / f"step{step}"
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--num_extract_workers",
        "1",
    ]
    command += [
        "--num_merge_workers",
        "1",
        "--input_folder",
        str(folder),
        "--output_folder",
        f"{folder}-universal",
    ]
    environment = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"soak: {' '.join(command)} failed:\n{done.stderr[-4000:]}")


def read(out: Path) -> list[dict[str, Any]]:
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def compare(calm: Path, rough: Path, events: Sequence[tuple[int, str]]) -> dict[str, Any]:
    undisturbed = {record["step"]: record["loss"] for record in read(calm)}
    disturbed = {
        record["step"]: record["loss"] for record in read(rough)
    }  # of steps made twice, the last
    assert undisturbed.keys() == disturbed.keys()
    resized = min((step for step, kind in events if "resize" in kind), default=len(undisturbed))
    apart = {step: abs(loss - disturbed[step]) / loss for step, loss in undisturbed.items()}
    checks = [record for record in read(calm) + read(rough) if "agree" in record]
    growth = [0.0]
    for process in {record["process"] for record in checks}:
        of_process = [record["mib"] for record in checks if record["process"] == process][1:]
        growth += [mib / of_process[0] - 1 for mib in of_process]
    return {
        "steps": len(undisturbed),
        "events": ", ".join(f"{kind} after {step}" for step, kind in events),
        "differences before the first resize": sum(
            value > 0 for step, value in apart.items() if step <= resized
        ),
        "largest relative difference": max(apart.values()),
        "last loss": (undisturbed[len(undisturbed)], disturbed[len(undisturbed)]),
        "checks on which ranks disagreed": sum(not record["agree"] for record in checks),
        "checks": len(checks),
        "largest growth of memory": max(growth),
    }


if __name__ == "__main__":
    sys.exit(main())
