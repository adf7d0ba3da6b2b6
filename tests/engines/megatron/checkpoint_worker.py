"""torchrun worker, 4 ranks: saves a run with dist_checkpointing, goes on from the file, and
compares with going on.

Usage: checkpoint_worker.py CASES.json OUT_DIR. A case names a format, the layout that saves and
those that load.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests import megatron_cpu

megatron_cpu.install()

import megatron.core.optimizer.distrib_optimizer as distributed  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from tests.engines.megatron.train_worker import optimizer_config, run  # noqa: E402
from weyl_megatron import AdamW2  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.engines.megatron.offload import CpuOffload  # noqa: E402

SAVED, END = 3, 6

#: Every writer is a fork of its rank, and most of what a save takes; there are two of them by
#: default.
ONE_WRITER = get_default_save_sharded_strategy()
ONE_WRITER.thread_count = 1


class Run:
    """A model and its optimizer, cut as a case says."""

    def __init__(self, case: dict[str, Any]) -> None:
        gpt.start(case)
        megatron.enable(**case.get("options", {}))
        self.case, self.model = case, gpt.build(case)
        self.optimizer = get_megatron_optimizer(optimizer_config(case), self.model)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.optimizer.zero_grad()
            gpt.backward(step, self.case, self.model)
            self.optimizer.step()

    def state(self, is_loading: bool) -> dict[str, Any]:
        """Return Megatron's sharded state dict of both."""
        metadata = dict(self.case.get("metadata", {}))  # Megatron writes its process groups into it
        if "fsdp" in self.case:
            return self._fsdp_state(is_loading, metadata)
        models = [chunk.module.sharded_state_dict(metadata=metadata) for chunk in self.model]
        state = {f"model{number}": model for number, model in enumerate(models)}
        optimizer = self.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
        return {**state, "optimizer": optimizer}

    def _fsdp_state(self, is_loading: bool, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return what Megatron-LM's ``--ckpt-format fsdp_dtensor`` saves by torch."""
        from megatron.core.distributed.fsdp.src.megatron_fsdp import uneven_dtensor

        (chunk,) = self.model
        state = {"model": chunk.state_dict()}  # which gives the module its DTensors back
        state["optimizer"] = self.optimizer.sharded_state_dict(
            {}, is_loading=is_loading, metadata=metadata
        )
        uneven_dtensor.preprocess_state_dict_for_uneven_dtensor(state)
        return state

    def save(self, path: Path) -> None:
        if "fsdp" in self.case:
            dcp.save(self.state(is_loading=False), checkpoint_id=path)
            return
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(is_loading=False), str(path), ONE_WRITER)
        dist.barrier()

    def load(self, path: Path) -> None:
        if "fsdp" in self.case:
            state = self.state(is_loading=True)
            dcp.load(state, checkpoint_id=path)
            # It was read into the parameters; Float16Module leaves its own name out of the keys.
            self.model[0].module.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            return
        loaded = dist_checkpointing.load(self.state(is_loading=True), str(path))
        for number, chunk in enumerate(self.model):
            chunk.module.load_state_dict(loaded[f"model{number}"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def result(self) -> dict[str, Any]:
        wrappers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        inner = [one.optimizer for one in wrappers]
        steps = {
            float(state["step"]) for one in inner for state in one.state.values() if "step" in state
        }
        kinds = AdamW2, CpuOffload
        in_group = [one for one in inner if isinstance(one, kinds) and one.engine.counts_in_groups]
        steps |= {float(group["step"]) for one in in_group for group in one.param_groups}
        keys = {tuple(sorted(state)) for one in inner for state in one.state.values()}
        return {
            "weights": gpt.whole(self.case, self.model),
            "steps": sorted(steps),
            "keys": sorted(keys),
        }


def resume(case: dict[str, Any], out: Path) -> dict[str, Any]:
    shared = {key: value for key, value in case.items() if key not in ("save", "loads")}
    distributed.HAVE_APEX_OR_TE = case.get("step_in_group", False)
    distributed.USING_TE_OPTIMIZER = case.get("step_in_group", False)
    first = Run({**shared, **case["save"]})
    first.train(0, SAVED)
    first.save(out / f"{case['name']}.checkpoint")
    first.train(SAVED, END)
    results = {"went on": first.result()}
    for name, layout in case["loads"].items():
        other = Run({**shared, **layout})
        other.load(out / f"{case['name']}.checkpoint")
        other.train(SAVED, END)
        results[name] = other.result()
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    run(lambda case: resume(case, folder), folder)
