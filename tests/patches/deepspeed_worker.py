"""torchrun worker: tests/engines/deepspeed/train_worker.py on a tree of DeepSpeed that has the
patch, or on none ("").

Usage: deepspeed_worker.py TREE CASES.json OUT_DIR. A case's "type" is the optimizer's name in JSON.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

if __name__ == "__main__":
    _, tree, cases, out = sys.argv
    if tree:
        sys.path.insert(0, tree)
    import deepspeed
    import torch

    from tests.engines.deepspeed import train_worker

    assert deepspeed.__file__.startswith(tree)
    assert hasattr(torch.optim, "AdamW2") == (not tree), (
        "the plugin is on for the tree, or off without it"
    )
    config_of = train_worker.config_of

    def named(case: dict[str, Any]) -> dict[str, Any]:
        config = config_of(case)
        config["optimizer"]["type"] = case.get("type", "AdamW2")
        return config

    # Compiled per tree, and kept where the installed DeepSpeed's is: the one would undo the
    # other's.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    train_worker.config_of = named
    sys.argv[1:] = [cases, out]
    train_worker.main()
