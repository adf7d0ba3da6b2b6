"""How a worker script ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys

import torch.distributed as dist


def leave() -> None:
    """Wait for the other ranks, take the process group down, and end the process with what was printed.

    Modules and engines are cycles that hold the group, so they go first; a rank that leaves early breaks the others'
    last collective. The interpreter is not torn down: one of gloo's threads may still ask for it then, which aborts
    the process.
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    for child in multiprocessing.active_children():  # of a checkpoint's writer; they would hold the output open
        child.terminate()
        child.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
