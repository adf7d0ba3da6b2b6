"""torchrun worker, 4 ranks: one gradient on one rank jumps, under megatron-core."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
import torch.distributed as dist

from tests import megatron_cpu

megatron_cpu.install()

from tests.engines.megatron import gpt  # noqa: E402
from tests.engines.megatron.nonfinite_worker import CASES, run  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.engines.shutdown import shutdown  # noqa: E402

#: A jump has to be compared with 32 steps.
STEPS, BAD = 38, (34, 36)


def main() -> None:
    dist.init_process_group("gloo")
    logging.basicConfig(level=logging.WARNING)
    megatron.enable(tau=0.02, spike="skip")
    for name in ("tp2-distributed", "pp2-distributed", "experts"):
        without = run(CASES[name], None, STEPS, BAD)
        with_jumps = run(CASES[name], 1e6, STEPS, BAD)
        same = all(torch.equal(*pair) for pair in zip(without, with_jumps, strict=True))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, same)
        if dist.get_rank() == 0:
            said = "as without that step" if all(everyone) else f"DIFFERS {everyone}"
            print(f"{name}: {said}", flush=True)
    sys.stdout.flush()
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
