"""torchrun worker, 2 ranks: DeepSpeed with M and V in bfloat16, against one process, and resumed.

Prints one line of JSON, by case: how far the weights are from those of one process after
:data:`STEPS` steps, and what that process is from one with moments in float32; whether a run that
is resumed goes on bit for bit; and what M and V are kept in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from tests import net as nets
from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

STEPS, SAVED = 6, 3
NARROW = {"state_dtype": "bfloat16"}
CPU = {"device": "cpu"}

CASES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero": {"stage": 1}, "params": NARROW},
    "ZeRO-2": {"zero": {"stage": 2}, "params": NARROW},
    "ZeRO-3": {"zero": {"stage": 3}, "params": NARROW},
    "ZeRO-2, projected": {"zero": {"stage": 2}, "params": {**NARROW, "clip": "project"}},
    "ZeRO-2, offload": {"zero": {"stage": 2, "offload_optimizer": CPU}, "params": NARROW},
    "ZeRO-3, offload": {"zero": {"stage": 3, "offload_optimizer": CPU}, "params": NARROW},
    # bf16_optimizer_states, whose masters are in bfloat16, too; at a β₂ that V cannot follow.
    "bf16 states": {
        "zero": {"stage": 2},
        "params": {"betas": [0.9, 0.999]},
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        },
    },
}


def make_engine(case: dict[str, Any]) -> Any:
    net = nets.make_net()
    config = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "gradient_accumulation_steps": nets.ACCUMULATION,
        "optimizer": {"type": "AdamW2", "params": {**nets.OPTIONS, **case["params"]}},
        "zero_optimization": case["zero"],
        "steps_per_print": 10**9,
        **({"bf16": case["bf16"]} if "bf16" in case else {}),
    }
    groups = nets.parameter_groups(net)
    return deepspeed.initialize(model=net, model_parameters=groups, config=config)[0]


def train(engine: Any, batches: list[Tensor]) -> None:
    dtype = next(engine.module.parameters()).dtype
    for batch in batches:
        for micro in batch[:, dist.get_rank()]:
            engine.backward(engine(micro.to(dtype) if micro.is_floating_point() else micro))
            engine.step()


def weights(engine: Any) -> dict[str, Tensor]:
    return {
        name: safe_get_full_fp32_param(param).detach().float().clone()
        for name, param in engine.module.named_parameters()
    }


def one_process(case: dict[str, Any], batches: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Return the weights of a run of plain torch on this rank alone."""
    net = nets.make_net()
    if "bf16" in case:
        net.bfloat16()
    groups = nets.parameter_groups(net)
    optimizer = AdamW2(groups, **{**nets.OPTIONS, **case["params"], **options}, model=net)
    for batch in batches:
        micros = batch.flatten(0, 1)
        optimizer.zero_grad()
        for micro in micros:
            (net(micro) / len(micros)).backward()
        optimizer.step()
    return {name: param.detach().float().clone() for name, param in net.named_parameters()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    gaps = sum(float((one[name] - each).square().sum()) for name, each in other.items())
    return float((gaps / sum(float(each.square().sum()) for each in other.values())) ** 0.5)


def measured(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    batches = list(nets.batches(dist.get_world_size()))[:STEPS]
    engine = make_engine(case)
    train(engine, batches[:SAVED])
    engine.save_checkpoint(str(folder))
    train(engine, batches[SAVED:])
    resumed = make_engine(case)
    resumed.load_checkpoint(str(folder))
    train(resumed, batches[SAVED:])
    ended, again = weights(engine), weights(resumed)
    states = engine.basic_optimizer.state.values()
    narrow = {"state_dtype": ["bfloat16", "float32"]} if "bf16" in case else {}
    expected = one_process(case, batches, **narrow)
    return {
        "apart": apart(ended, expected),
        "of rounding": apart(expected, one_process(case, batches, state_dtype="float32")),
        "resumed": all(torch.equal(ended[name], again[name]) for name in ended),
        "kept": sorted({str(s[k].dtype) for s in states for k in ("exp_avg", "exp_avg_sq")}),
        "v": sorted({str(state["exp_avg_sq"].dtype) for state in states}),
    }


def main() -> None:
    tolerances.make_every_iteration()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        found[name] = measured(case, Path(sys.argv[1]) / str(number))
        dist.barrier()
    if dist.get_rank() == 0:
        print(f"moments {json.dumps(found)}", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
