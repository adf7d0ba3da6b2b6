"""How a script that trained on several processes ends.

DeepSpeed and Megatron hold process groups beyond ``destroy_process_group``, and with them gloo's
threads. One of these may still be giving the last collective's tensors back while Python is torn
down; it asks for the interpreter then, which aborts the process ("terminate called without an
active exception", pytorch/pytorch#190489).
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import sys
from typing import NoReturn

import torch.distributed as dist


def shutdown(status: int = 0) -> NoReturn:
    """Wait for the other ranks, destroy the process group if there is one, and end the process with
    ``status``.

    What was registered with `atexit` is run and what was printed is written, as at any end; the
    interpreter is not torn down. Call it on all ranks, last of all, as in ``shutdown(main())``: no
    ``finally`` and no ``__del__`` is run after it.
    """
    if dist.is_initialized():
        gc.collect()  # engines are cycles that hold groups
        dist.barrier()  # a rank that leaves early breaks the others' last collective
        dist.destroy_process_group()
    for child in (
        multiprocessing.active_children()
    ):  # of a checkpoint's writer; they would hold the output open
        child.terminate()
        child.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
