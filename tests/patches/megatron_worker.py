"""torchrun worker: tests/engines/megatron/train_worker.py on a tree of megatron-core that has the
patch.

Usage: megatron_worker.py TREE CASES.json OUT_DIR. Without a TREE ("") the installed megatron-core
trains, through the adapter. In a TREE nothing of ours is called: a case's options are fields of
Megatron's OptimizerConfig.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

if __name__ == "__main__":
    _, tree, cases, out = sys.argv
    if tree:
        sys.path.insert(0, tree)
    from tests.engines.megatron import train_worker

    train, optimizer_config = train_worker.train, train_worker.optimizer_config

    def with_fields(case: dict[str, Any]) -> Any:
        fields = dict(case.get("fields", {}))
        if tree:
            fields |= {f"adamw2_{key}": value for key, value in case.get("options", {}).items()}
        return dataclasses.replace(optimizer_config(case), **fields)

    def without_the_door(case: dict[str, Any]) -> Any:
        import megatron.core

        assert megatron.core.__file__.startswith(tree)
        return train({**case, "enable": False} if tree else case)

    train_worker.optimizer_config, train_worker.train = with_fields, without_the_door
    sys.argv[1:] = [cases, out]
    train_worker.main()
