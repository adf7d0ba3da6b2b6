"""torchrun worker: leaves with a child that runs, something to do at the end, and an object that
says when it goes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import time

import torch
import torch.distributed as dist

from weyl_megatron.engines.shutdown import shutdown


class Torn:
    def __del__(self) -> None:
        print("torn down", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    kept = dist.group.WORLD  # as DeepSpeed keeps it
    torn = Torn()
    atexit.register(print, "end of rank", dist.get_rank())
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    time.sleep(dist.get_rank())
    dist.all_reduce(torch.ones(1))
    shutdown()
