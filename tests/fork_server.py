"""Forks the ranks of a worker script from a process that has imported their engine.

    python -m tests.fork_server ENGINE

A rank that starts by itself imports its engine by itself: 2 to 4 seconds of a core, for most tests
more than all that it then does. Here the engine is imported once, before there is a thread or a
process group. A rank is a fork that takes the environment, the arguments and the name ``__main__``
that torchrun would have given to it.

What differs from torchrun: all ranks have one hash seed, as they are copies of one process. `make
test-all` starts them with torchrun (`tests/processes.py`).

A request is a line of JSON on the standard input, which `tests/processes.py` writes: ``worker``,
``processes``, ``arguments``, ``environment``, ``output`` (a file) and ``timeout`` (seconds). The
answer is a line of JSON on the standard output: ``status``, that of the first rank that failed or
0, and ``timed_out``. The end of the input ends the server and all that it has started.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

#: What is imported before ranks are forked. Nothing of weyl_megatron: engines have to find AdamW2.
MODULES = {
    "torch": ("torch.distributed", "torch._dynamo"),
    "deepspeed": (
        "deepspeed",
        "deepspeed.moe.layer",
        "deepspeed.ops.adam",
        "deepspeed.pipe",
        "torch._dynamo",
    ),
    "huggingface": ("accelerate", "deepspeed", "peft", "transformers.trainer", "torch._dynamo"),
    "megatron": (
        "megatron.core.dist_checkpointing",
        "megatron.core.distributed",
        "megatron.core.models.gpt.gpt_layer_specs",
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel",
        "torch._dynamo",
    ),
}

#: Seconds that the other ranks have once one has failed, to say why.
GRACE = 2.0


def main(engine: str) -> Callable[[], None] | None:
    """Serve requests; in a rank, return what it has to run, below which no frame of the server is
    left.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    if engine == "megatron":
        from tests import megatron_cpu

        megatron_cpu.install()
    for module in MODULES[engine]:
        importlib.import_module(module)
    if "deepspeed" in sys.modules:
        # It would be compiled and is for inference: training on gloo does not call it.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").is_dir() else 1
    assert threads == 1, f"{engine} has {threads - 1} threads, which a fork would not have"
    answers.write("ready\n")
    answers.flush()
    while line := sys.stdin.readline():
        request = json.loads(line)
        store, port = start_store()
        ranks = []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                return become_rank(request, rank, port, store)
            os.setpgid(pid, store)
            ranks.append(pid)
        answers.write(json.dumps(wait(ranks, store, request["timeout"])) + "\n")
        answers.flush()
    return None


def start_store() -> tuple[int, int]:
    """Start the store at which ranks meet, as torchrun's agent has one; return its process and its
    port, which the system chose: no two launches take the same.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.setpgid(pid, pid)
        with os.fdopen(reader) as told:
            return pid, int(told.readline())
    end_with_parent()
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, f"{store.port}\n".encode())
    os.close(writer)
    while True:
        signal.pause()


def become_rank(request: dict[str, Any], rank: int, port: int, group: int) -> Callable[[], None]:
    """Give this process what torchrun gives to a rank; return the worker script to run."""
    end_with_parent()
    faulthandler.enable()  # SIGABRT, after a time-out, prints where it is
    worker, world = Path(request["worker"]), str(request["processes"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(
        request["environment"],
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        ROLE_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=world,
        LOCAL_WORLD_SIZE=world,
        ROLE_WORLD_SIZE=world,
        GROUP_WORLD_SIZE="1",
        ROLE_NAME="default",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_RUN_ID=f"forked-{group}",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCH_NCCL_ASYNC_ERROR_HANDLING="1",
    )
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # of its own, as in a process of its own
    sys.argv = [str(worker), *request["arguments"]]
    sys.path[0] = str(worker.parent)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=str(worker), __builtins__=__builtins__)
    code = compile(worker.read_bytes(), str(worker), "exec", dont_inherit=True)

    def run() -> None:
        sys.modules["__main__"] = module
        exec(code, module.__dict__)

    return run


def wait(ranks: list[int], group: int, timeout: float) -> dict[str, Any]:
    """Wait until all ranks have ended, one has failed, or the time is over; leave none behind."""
    status, timed_out = 0, False
    deadline = time.monotonic() + timeout
    while ranks:
        if select.select([0], [], [], 0.005)[0]:  # nobody asks before the answer: it is the end
            os.killpg(group, signal.SIGKILL)
            sys.exit("the tests have ended")
        for pid in ranks[:]:
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                ranks.remove(pid)
                if code and not status:
                    status = os.waitstatus_to_exitcode(code)
                    deadline = min(deadline, time.monotonic() + GRACE)
        if ranks and time.monotonic() > deadline:
            if timed_out or status:
                os.killpg(group, signal.SIGKILL)
                deadline = float("inf")
            else:
                timed_out, status = True, 1
                os.killpg(group, signal.SIGABRT)
                deadline = time.monotonic() + GRACE
    os.killpg(group, signal.SIGKILL)  # the store, and what ranks have started
    os.waitpid(group, 0)
    return {"status": status, "timed_out": timed_out}


def end_with_parent() -> None:
    """Let the system end this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    server = sys.modules["__main__"]  # stays alive
    if (run := main(sys.argv[1])) is not None:
        run()
