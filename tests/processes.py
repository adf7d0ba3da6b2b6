"""Runs a worker script on several real processes, with gloo and the CPU: forked from a process that
has imported their engine, or started by torchrun, as a user would.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent

#: Seconds after which a launch is taken to hang. The longest takes 60 on two idle cores.
HANGS = 900.0


def environment() -> dict[str, str]:
    """Return the environment of a worker. MEGATRON_CORE names the folder of a megatron-core that
    goes before the one that is installed.
    """
    given = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    folders = filter(None, [str(ROOT), os.environ.get("MEGATRON_CORE")])
    return {**os.environ, **given, "PYTHONPATH": os.pathsep.join(folders)}


def torchrun(
    worker: Path,
    processes: int,
    *args: str,
    timeout: float = HANGS,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run ``worker`` on ``processes`` processes and return what they printed; fail with its end if
    it fails.

    Args:
        variables: of the environment, beside those of every worker.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [sys.executable, *launcher, str(worker), *args],
        env={**environment(), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, (
        f"{worker.name} on {processes} processes failed:\n{run.stdout[-6000:]}"
    )
    return run.stdout


def run_ranks(engine: str, worker: Path, processes: int, *args: str, timeout: float = HANGS) -> str:
    """Do what `torchrun` does, with ranks that are forked from a process that has imported
    ``engine``: one of `tests.fork_server.MODULES`.

    With WEYL_MEGATRON_TORCHRUN in the environment, it is `torchrun`.
    """
    if os.environ.get("WEYL_MEGATRON_TORCHRUN"):
        return torchrun(worker, processes, *args, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        output.touch()
        answer = server_of(engine).ask(
            worker=str(worker),
            processes=processes,
            arguments=args,
            environment=environment(),
            output=str(output),
            timeout=timeout,
        )
        printed = output.read_text(errors="replace")
    ending = f"hung for {timeout:.0f} s" if answer["timed_out"] else f"ended {answer['status']}"
    assert answer["status"] == 0, (
        f"{worker.name} on {processes} processes {ending}:\n{printed[-6000:]}"
    )
    return printed


@cache
def server_of(engine: str) -> Server:
    return Server(engine)


class Server:
    """A running `tests.fork_server`; it ends with this process."""

    def __init__(self, engine: str) -> None:
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as this)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", engine],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.process.stdin.close)  # type: ignore[union-attr]
        assert self.answer() == "ready\n", self.said()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.answer()
        assert answer, self.said()
        loaded: dict[str, Any] = json.loads(answer)
        return loaded

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def said(self) -> str:
        self.log.seek(0)
        return f"the server of ranks ended {self.process.poll()}:\n{self.log.read()[-6000:]}"
