"""Plays each day in a process of its own, so that a crash ends that one alone and is seen.

The server has imported torch and compiled the kernel, and forks for every day. It is a process of
its own, too: to fork from pytest's, whose other tests have started threads, is not safe.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from types import TracebackType

import torch

from tests.day import faults
from tests.day.actions import Step
from tests.day.play import Day, Verdict, play
from tests.processes import ROOT

#: Seconds of CPU time that a day may take, and of any time, of which a busy machine may give it
#: little.
LIMIT, WAIT = 60, 900


class Server:
    """A running server.

    Args:
        fault: a name in ``faults.FAULTS``, to be planted in every day's process.
    """

    def __init__(self, fault: str = "") -> None:
        environment = dict(
            os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.day.server", fault],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(WAIT)

    def play(self, day: Day) -> Verdict:
        """Play a day in a process of its own."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(day, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)


def fork(day: Day, fault: str = "") -> Verdict:
    """Play a day in a child; a signal that ends it is its failure."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _live(day, fault, write)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = json.loads(lines[-1]) if lines else None
    if status == 0 and isinstance(last, dict):
        return Verdict(**last)
    ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    name = type(day.actions[last]).__name__ if isinstance(last, int) else "the beginning"
    return Verdict(failure=f"action {last}, {name}: {ended}")


def _live(day: Day, fault: str, pipe: int) -> None:
    """Be the child: tell the number of every action before it is played, and the verdict at the
    end.
    """
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    signal.alarm(WAIT)
    try:
        with os.fdopen(pipe, "w", encoding="utf-8", buffering=1) as told:
            faults.plant(fault)
            verdict = play(day, lambda number: print(number, file=told))
            print(json.dumps(asdict(verdict)), file=told)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(fault: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get between the answers
    torch.set_num_threads(1)
    logging.getLogger("weyl_megatron").setLevel(
        logging.ERROR
    )  # what is guessed of each day's model
    play(
        Day(("linear", "conv2d"), (Step(0), Step(1)))
    )  # compiles the kernel, and imports what is imported late
    gc.freeze()  # a collection would have every child copy what it only reads
    while True:
        try:
            day = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(fork(day, fault), answers)
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
