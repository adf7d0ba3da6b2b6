"""torchrun worker: rank 1 does not come back from its third step for a while, beside
examples/deepspeed's heartbeat.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from examples.deepspeed.heartbeat import Heartbeat
from weyl_megatron.engines.shutdown import shutdown


def stuck() -> None:
    time.sleep(4)


dist.init_process_group("gloo")
heartbeat = Heartbeat(1.0, 0)
for step in range(4):
    if (step, dist.get_rank()) == (2, 1):
        stuck()
    dist.all_reduce(torch.ones(1))
    heartbeat.at(step + 1)
heartbeat.close()
shutdown()
