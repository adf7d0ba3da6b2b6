"""Names the rank that the others wait for, long before a collective's timeout, which names none.

Every rank tells torch's store that it lives, and looks after the rank before it: one key a rank,
read by one. Only lines are printed, no rank is ended, and no collective is made, so that it is safe
whatever the backend.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from types import FrameType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

#: Where a main thread that waits for other ranks is: in these files, or in what these call.
WAITS = (
    f"{os.sep}torch{os.sep}",
    f"{os.sep}deepspeed{os.sep}",
    f"examples{os.sep}deepspeed{os.sep}loop.py",
)


class Heartbeat:
    """A thread beside the training loop.

    Args:
        seconds: a rank that was silent, or in one step, for so long is named; 0: no thread.
        step: the steps that have been made.
    """

    def __init__(self, seconds: float, step: int) -> None:
        self.step, self.seconds = step, seconds
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._main, self._closed = threading.main_thread().ident, threading.Event()
        self._since = time.monotonic()  # when this step began
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if seconds and self.ranks > 1:
            # Its own connection: another thread's call on the process group's would wait for ours.
            self._store = dist.PrefixStore("heartbeat", _get_default_store().clone())
            self._thread.start()

    def at(self, step: int) -> None:
        """Note that a step has been made."""
        self.step, self._since = step, time.monotonic()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        watched = (self.rank + 1) % self.ranks
        me = f"{socket.gethostname()}, pid {os.getpid()}"
        beat, heard, last, is_named = 0, "", time.monotonic(), False
        reported = -1  # the last step in which this rank was said to be busy
        while beat == 0 or not self._closed.wait(min(self.seconds / 5, 10)):
            beat += 1
            try:
                self._store.set(str(self.rank), f"{beat}|{self.step}|{me}")
                now = ""
                if self._store.check([str(watched)]):
                    now = self._store.get(str(watched)).decode()
            except Exception as error:
                ends = f"heartbeat: rank {self.rank} ({me}) ends it"
                self._say(f"{ends}: torch's store does not answer: {error}")
                return
            _, step, other = (now or heard or "||not heard of yet").split("|", 2)
            if now != heard:
                if is_named:
                    self._say(f"rank {watched} ({other}) is heard of again")
                heard, last, is_named = now, time.monotonic(), False
            elif not is_named and time.monotonic() - last > self.seconds:
                is_named = True
                self._say(
                    f"rank {watched} ({other}) has been silent for {self.seconds:g} s, after step "
                    f"{step}: its process or its machine has stopped, and the other ranks wait for "
                    "it"
                )
            if reported < self.step and time.monotonic() - self._since > self.seconds:
                where = self._busy()
                if where:
                    reported = self.step
                    self._say(
                        f"rank {self.rank} ({me}) has been in step {self.step + 1} for "
                        f"{self.seconds:g} s, at {where}; the other ranks wait for it"
                    )

    def _busy(self) -> str:
        """Where the main thread is, if not where it waits for other ranks."""
        frame: FrameType | None = sys._current_frames().get(self._main or 0)
        if frame is None or any(part in frame.f_code.co_filename for part in WAITS):
            return ""
        return f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
