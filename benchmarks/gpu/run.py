"""Starts the parts one after the other, each under its limit, and saves what they say."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.part import NOT_RUN, RESULT, ROOT, STOP, Task
from weyl_megatron.kernels.choice import VARIABLE


class Part(NamedTuple):
    """A part: the function of its name in a module beside this one."""

    name: str
    module: str
    limit: float  # seconds at most on a GPU
    interpreted: bool = False  # whether a CPU tries its kernels under Triton's interpreter


#: The first truths first: what is left of the time goes to the last.
PARTS = (
    Part("env", "machine", 40),
    Part("warm", "machine", 110),
    Part("cuda", "machine", 90),
    Part("kernels", "correct", 60, interpreted=True),
    Part("profile", "timing", 45),
    Part("big", "correct", 60),
    Part("step124", "timing", 50),
    Part("large", "large", 60),
    Part("zero", "ranks", 75),
    Part("two", "ranks", 45),
    Part("stepg", "timing", 70),
    Part("step774", "timing", 60),
    Part("train", "train", float("inf")),
)

#: Parts that only parts start.
_INNER = {"rank": "ranks"}

#: How much longer a CPU may take, though what it tries is tiny.
_CPU = 4.0

#: A part is not begun with fewer seconds, and the run keeps so many for its own end.
_LEAST, _RESERVE = 8.0, 3.0


def function_of(name: str) -> Callable[[Task], None]:
    """Return what does a part."""
    module = next((part.module for part in PARTS if part.name == name), _INNER.get(name))
    if module is None:
        raise ValueError(f"--part got {name!r}, which is none")
    function: Callable[[Task], None] = getattr(
        importlib.import_module(f"benchmarks.gpu.{module}"), name
    )
    return function


def run(options: argparse.Namespace, out: Path) -> int:
    """Run the parts that the options name; return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    parts: dict[str, dict[str, Any]] = {}
    report = {"device": options.device, "tiny": options.tiny, "begun": time.strftime("%F %T %Z")}

    def save() -> None:
        seconds = round(time.monotonic() - begin, 1)
        _write(out / "results.json", {**report, "seconds": seconds, "parts": parts})

    for name in ("step_time.md", "train.jsonl", "train.svg"):
        (out / name).unlink(missing_ok=True)  # of a run before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part ends with this, too
    stopped = ""
    with (out / "log.txt").open("w") as log:
        for part in PARTS:
            if (options.only and part.name not in options.only) or part.name in options.skip:
                continue
            left = options.seconds - (time.monotonic() - begin) - _RESERVE
            limit = min(part.limit * (_CPU if options.device == "cpu" else 1), left)
            entry: dict[str, Any] = {"status": "running", "results": []}
            parts[part.name] = entry
            if stopped or limit < _LEAST:
                entry["status"] = f"not run: {stopped or 'out of time'}"
                entry["passed"] = False
            else:
                save()
                status = _run_part(part, limit, options, out, entry, log, save)
                if status == STOP:
                    stopped = f"{part.name} failed"
            save()
            print(f"{part.name}: {entry['status']}, {entry.get('seconds', 0)} s", flush=True)
            if not entry["passed"]:
                print("\n".join(f"    {line}" for line in entry.get("tail", [])[-6:]), flush=True)
    print(f"wrote {out}/results.json and {out}/log.txt, {time.monotonic() - begin:.0f} s")
    return int(not all(entry["passed"] for entry in parts.values()))


def _run_part(
    part: Part,
    limit: float,
    options: argparse.Namespace,
    out: Path,
    entry: dict[str, Any],
    log: Any,
    save: Callable[[], None],
) -> int:
    """Run a part in a process of its own, and note what it says; return its exit status."""
    task = Task(options.device, options.tiny, time.time() + limit, out, options.train_seconds)
    log.write(f"\n===== {part.name}, limit {limit:.0f} s\n")
    start = time.monotonic()
    process = subprocess.Popen(
        _command(part, task),
        env=_environment(part, out, on_gpu=task.is_gpu),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timed_out = threading.Event()

    def end_late() -> None:
        timed_out.set()
        _end(process)

    timer = threading.Timer(limit, end_late)
    timer.start()
    reason, tail = "", list[str]()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith(RESULT):
                entry["results"].append(json.loads(line.removeprefix(RESULT)))
                save()
                print(f"  {line.removeprefix(RESULT).strip()[:400]}", flush=True)
            elif line.startswith(NOT_RUN):
                reason = line.removeprefix(NOT_RUN).strip()
            else:
                tail = [*tail[-14:], line.rstrip()]
        status = process.wait()
    finally:
        timer.cancel()
        _end(process)  # and what it left running
    if timed_out.is_set():
        entry["status"] = f"timed out after {limit:.0f} s"
    elif status:
        entry["status"] = f"failed ({status})"
    else:
        entry["status"] = f"not run: {reason}" if reason else "passed"
    entry["passed"] = status == 0 and not timed_out.is_set()
    entry["seconds"] = round(time.monotonic() - start, 1)
    if not entry["passed"]:
        entry["tail"] = tail
    return status


def _command(part: Part, task: Task) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, *task.options()]


def _environment(part: Part, out: Path, *, on_gpu: bool) -> dict[str, str]:
    """Return a part's environment.

    A step that Triton cannot make on a GPU is refused, unless the caller's environment has it
    otherwise: nothing is timed in plain torch by mistake. The interpreter of Triton has to be asked
    for before it is imported.
    """
    given = {"OUT": str(out), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if on_gpu:
        if part.module != "machine":  # whose doctor says what users get
            given[VARIABLE] = os.environ.get(VARIABLE, "triton")
        return {**os.environ, **given}
    given |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": str(int(part.interpreted))}
    return {**os.environ, **given}


def _end(process: subprocess.Popen[str]) -> None:
    """End a part and all that it started, which are one process group."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(patience if process.poll() is None else 0.1)


def _write(path: Path, report: dict[str, Any]) -> None:
    """Write a file that is whole at any moment."""
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)
