"""torchrun worker, 2 ranks: one gradient on one rank jumps, under DeepSpeed, which steps in parts
and clips the norm of all gradients.
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.engines.deepspeed.nonfinite_worker import OFF, config_of, run
from weyl_megatron.engines.shutdown import shutdown

#: A jump has to be compared with 32 steps, and parts of a step with each other.
STEPS, BAD = 40, (34, 36)

CASES = {
    **{f"zero{stage}": config_of(stage) for stage in range(4)},
    "zero2-bf16": config_of(2, bf16={"enabled": True}),
    "zero3-parts": config_of(3, zero={"sub_group_size": 4000}),
    "zero2-offload": config_of(2, zero={"offload_optimizer": {"device": "cpu"}}),
}


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    logging.basicConfig(level=logging.WARNING)
    for name, config in CASES.items():
        config["optimizer"]["params"] = {"lr": 0.01, "tau": 0.05, "spike": "skip"}
        without = run(config, None, steps=STEPS, bad=BAD)
        with_jumps = run(config, 1e6, steps=STEPS, bad=BAD)
        same = all(torch.equal(*pair) for pair in zip(without, with_jumps, strict=True))
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, same)
        if dist.get_rank() == 0:
            said = "as without that step" if all(everyone) else f"DIFFERS {everyone}"
            print(f"{name}: {said}", flush=True)
    config = config_of(2, **OFF)  # whose norm nobody looks at
    config["optimizer"]["params"] = {"lr": 0.01, "spike": "skip"}
    try:
        run(config, None, steps=1, bad=())
    except ValueError as error:
        print(f"not told: {error}", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
