"""torchrun worker, 2 ranks: ZeRO-3 with its optimizer, and its parameters, in files, against the
CPU's memory and against one process; and resumed from a checkpoint.

Usage: nvme_worker.py FOLDER; then on 1 rank nvme_worker.py FOLDER load, to load what two saved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
)
from torch import Tensor, nn

from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

BEFORE_0_19 = tuple(map(int, deepspeed.__version__.split(".")[:2])) < (0, 19)

STEPS, HALF, MICRO = 10, 5, 2
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "tau": 0.01}

#: A sub-group takes parameters until it has so many elements on a rank; DeepSpeed keeps those in
#: memory that are under 1 MiB.
SUB_GROUP = 200_000


class Net(nn.Module):
    """Two weights of 1.01 MiB on each of two ranks, and smaller ones."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(701, 757)
        self.down = nn.Linear(757, 701)
        self.head = nn.Linear(701, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        # Not the mean: gradients near eps would be told apart by their roundings.
        return 100 * self.head(x).float().square().sum()


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [p for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for n, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(MICRO, 701, generator=generator)


def make(case: dict[str, Any], folder: Path, seed: int = 0, is_first: bool = True) -> Any:
    swap = {"device": "nvme", "nvme_path": str(folder)}
    offload = {"device": "cpu"} if case.get("cpu") else {**swap, **case.get("optimizer", {})}
    zero: dict[str, Any] = {
        "stage": 3,
        "sub_group_size": SUB_GROUP,
        "offload_optimizer": offload,
        "stage3_param_persistence_threshold": 1000,
    }
    if "param" in case:
        zero["offload_param"] = {**swap, **case["param"]}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO,
        "optimizer": {"type": "AdamW2", "params": {**OPTIONS, **case.get("options", {})}},
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if case.get("bf16"):
        config["bf16"] = {"enabled": True}
    net = Net(seed)
    if is_first:  # in its process: DeepSpeed names files by a count of the process's parameters
        deepspeed.zero.Init.param_id = 0
    engine, *_ = deepspeed.initialize(model=net, model_parameters=groups_of(net), config=config)
    return engine


def train(engine: Any, steps: range) -> None:
    rank = dist.get_rank()
    for step in steps:
        x = batch(step, rank)
        engine.backward(engine(x.bfloat16() if engine.bfloat16_enabled() else x))
        engine.step()


def results(engine: Any) -> dict[str, Tensor]:
    """Return masters, moments and what the last step did."""
    found = {}
    for name, param in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(param).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{key}"] = safe_get_full_optimizer_state(param, key).clone()
    for name, entry in engine.basic_optimizer.stats().items():
        found[f"stats.{name}"] = torch.tensor([float(number) for number in entry[:6]])
    return found


def differences(some: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    assert some.keys() == others.keys(), some.keys() ^ others.keys()
    pairs = {name: (some[name], others[name]) for name in some}
    return {n: float((a - b).abs().max()) for n, (a, b) in pairs.items() if not torch.equal(a, b)}


def one_process(options: dict[str, Any]) -> dict[str, Tensor]:
    net = Net()
    optimizer = AdamW2(groups_of(net), **{**OPTIONS, **options}, model=net)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(dist.get_world_size()):
            (net(batch(step, rank)) / dist.get_world_size()).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


#: Small ones, which are enough: by default DeepSpeed takes 2 GB for parameters.
_PARAM = {"buffer_count": 6, "buffer_size": 600_000, "max_in_cpu": 0}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pipelined": {"optimizer": {"pipeline_read": True, "pipeline_write": True, "buffer_count": 10}},
    "projected": {"options": {"clip": "project"}},
    "bf16": {"bf16": True},
    "parameters": {"param": _PARAM},
}


def run(name: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train in files and in memory, and in files again from a checkpoint half way."""
    memory = make({**case, "cpu": True, "param": {"device": "cpu"}}, folder)
    train(memory, range(STEPS))
    expected = results(memory)
    memory.destroy()

    whole = make(case, folder / name)
    files = [[flat is None for flat in whole.optimizer.fp16_partitioned_groups_flat]]
    files.append([not p.numel() for p in whole.optimizer.fp32_partitioned_groups_flat])
    train(whole, range(HALF))
    whole.save_checkpoint(str(folder / f"{name}-saved"), tag="half")
    train(whole, range(HALF, STEPS))
    found = results(whole)
    whole.destroy()

    resumed = make(case, folder / f"{name}-resumed", seed=1)
    resumed.load_checkpoint(str(folder / f"{name}-saved"), tag="half")
    train(resumed, range(HALF, STEPS))
    again = results(resumed)
    resumed.load_checkpoint(str(folder / f"{name}-saved"), tag="half")  # where it has stepped, too
    train(resumed, range(HALF, STEPS))
    twice = results(resumed)
    resumed.destroy()

    gaps = {}
    if not case.get("bf16"):
        alone = one_process(case.get("options", {}))
        gaps = {n: float((found[n] - weight).norm() / weight.norm()) for n, weight in alone.items()}
    return {
        "parameters": files[0],
        "optimizer": files[1],
        "memory": differences(found, expected),
        "resumed": differences(again, found),
        "twice": differences(twice, found),
        "clipped": [n for n, entry in found.items() if n.startswith("stats.") and entry[3]],
        "stats": sorted(n for n in found if n.startswith("stats.")),
        "gap": max(gaps.values(), default=0.0),
    }


def refusals(folder: Path) -> dict[str, str]:
    """Return what is said of weights that only the model has, and of a checkpoint whose files have
    other names; and of masters that the user sets.
    """
    said = {}
    moved = make({}, folder / "moved")
    moved.module.up.weight.ds_tensor.add_(1)
    said["moved"] = refused(lambda: train(moved, range(1)))
    moved.destroy()
    other = make({}, folder / "other", is_first=False)
    # Of a whole weight DeepSpeed 0.19.8 sets an even number of elements alone.
    weight = other.module.up.weight
    safe_set_local_fp32_param(weight, torch.ones(weight.ds_tensor.numel()))
    said["set"] = refused(lambda: train(other, range(1)))
    saved = str(folder / "plain-saved")
    said["other names"] = refused(lambda: other.load_checkpoint(saved, tag="half"))
    other.destroy()
    return said


def refused(act: Callable[[], object]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    tolerances.make_every_iteration()  # so that no rounding decides on one
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=30), verbose=False)
    if BEFORE_0_19 or not AsyncIOBuilder().is_compatible(verbose=False):
        print("nvme skipped")
        shutdown()
        return
    if dist.get_rank() == 0:
        AsyncIOBuilder().load(verbose=False)
    dist.barrier()
    if sys.argv[2:] == ["load"]:
        alone = make({}, folder / "alone")
        said = refused(lambda: alone.load_checkpoint(str(folder / "plain-saved"), tag="half"))
        print("nvme load " + json.dumps(said), flush=True)
        shutdown()
        return
    for name, case in CASES.items():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, run(name, case, folder))
        if dist.get_rank() == 0:
            print(f"nvme {name} " + json.dumps(everyone), flush=True)
    said = refusals(folder)
    if dist.get_rank() == 0:
        print("nvme refusals " + json.dumps(said), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
