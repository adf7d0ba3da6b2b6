"""torchrun worker: trains tests/net.py under DeepSpeed for every case of a list and saves what came
out.

Usage: train_worker.py CASES.json OUT_DIR. Imports nothing to train with AdamW2: DeepSpeed finds it
by its name.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from tests import net as nets
from tests import tolerances
from tests.engines.megatron_style import ToyMpu, tensor_parallel_net, whole
from weyl_megatron.engines.shutdown import shutdown

#: On gloo, DeepSpeed before 0.19 gathers into a buffer that requires grad, which torch allows under
#: no_grad alone, and at stage 3 races on the parameters that it keeps whole: its own AdamW ends now
#: right, now anywhere.
BEFORE_0_19 = tuple(map(int, deepspeed.__version__.split(".")[:2])) < (0, 19)


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": case["stage"],
        "round_robin_gradients": case.get("round_robin", False),
    }
    if case.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if BEFORE_0_19 and case["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    zero |= case.get("zero", {})
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "gradient_accumulation_steps": nets.ACCUMULATION,
        "optimizer": {"type": "AdamW2", "params": {**nets.OPTIONS, **case.get("params", {})}},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if case["dtype"] == "bf16":
        config["bf16"] = {"enabled": True}
        if case.get("grad_dtype"):
            config["data_types"] = {"grad_accum_dtype": case["grad_dtype"]}
    if case["dtype"] == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "hysteresis": 1}
    if case.get("tp") == "auto":
        rules = [
            {"patterns": [r"up\.weight$"], "partition_type": "column"},
            {"patterns": [r"down\.weight$"], "partition_type": "row"},
        ]
        config["tensor_parallel"] = {
            "autotp_size": case["tp_size"],
            "partition_config": {"use_default_specs": False, "layer_specs": rules},
        }
    return config | case.get("config", {})


def train(case: dict[str, Any]) -> dict[str, Any]:
    config = config_of(case)
    mixed = case.get("mixed", False)
    mpu = ToyMpu(case["tp_size"]) if case.get("tp") == "mpu" else None
    if case.get("zero_init"):
        with deepspeed.zero.Init(config_dict_or_path=config):
            net = nets.make_net(mixed)
        reference = nets.make_net(mixed)
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
                if dist.get_rank() == 0:
                    p.data.copy_(q.data)
    else:
        net = nets.make_net(mixed) if mpu is None else tensor_parallel_net(nets.make_net(), mpu)
    if case.get("leaf"):
        deepspeed.utils.set_z3_leaf_modules(net, [torch.nn.Linear])
    groups = nets.parameter_groups(net)
    engine, _, _, _ = deepspeed.initialize(
        model=net, model_parameters=groups, config=config, mpu=mpu
    )

    if case.get("compile"):
        engine.compile(backend="eager")
    replicas = dist.get_world_size() // case.get("tp_size", 1)
    replica = dist.get_rank() // case.get("tp_size", 1)
    overflow_kept = None
    for step, global_batch in enumerate(nets.batches(replicas)):
        before = snapshot(engine) if step == case.get("overflow_at") else None
        for micro in global_batch[:, replica]:
            loss = engine(micro)
            if step == case.get("overflow_at"):
                loss = loss * float("inf")
            engine.backward(loss)
            with torch.set_grad_enabled(not BEFORE_0_19):
                engine.step()
        if case.get("offload_states"):
            engine.offload_states()
            engine.reload_states()
        if before is not None:
            overflow_kept = all(map(torch.equal, before, snapshot(engine)))

    stats = engine.basic_optimizer.stats()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: tuple(entry) for name, entry in stats.items()})
    straddles: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(straddles, straddled(engine.basic_optimizer))
    return {
        "weights": {
            name: whole(p, full_fp32(engine, p), engine)
            for name, p in engine.module.named_parameters()
        },
        "stats": everyone,
        "straddled": sorted(set().union(*straddles)),
        "overflow_kept": overflow_kept,
        "wrapper": type(engine.optimizer).__name__,
        "steps": int(next(iter(engine.basic_optimizer.state.values()))["step"]),
    }


def snapshot(engine: Any) -> list[torch.Tensor]:
    """Copies of everything that an optimizer step changes: the masters, their moments, the step
    counts.
    """
    state = engine.basic_optimizer.state
    return [p.detach().clone() for p in state] + [
        value.clone() for entry in state.values() for value in entry.values()
    ]


def straddled(optimizer: Any) -> list[str]:
    """Names of the matrices of which this rank's first or last row is cut."""
    names = []
    for buffer in optimizer._tensors._buffers.values():
        for parameter, start, stop, _ in buffer.shards:
            shape = parameter.shape
            width = shape[-1] if len(shape) == 3 else prod(shape[1:])
            if len(shape) > 1 and start < stop and (start % width or stop % width):
                names.append(parameter.name)
    return names


def full_fp32(engine: Any, param: Any) -> torch.Tensor:
    """Return this tensor-parallel rank's whole parameter in fp32, from the masters that the
    optimizer steps.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):
        copies = zip(chain(*wrapper.fp16_groups), chain(*wrapper.fp32_groups), strict=True)
        return next(master for p, master in copies if p is param).detach()
    if wrapper is engine.basic_optimizer:
        return param.detach()
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        # Not safe_get_full_fp32_param: it is wrong under round_robin_gradients.
        group = next(
            g for g, params in enumerate(wrapper.bit16_groups) if any(p is param for p in params)
        )
        mine = wrapper.single_partition_of_fp32_groups[group].detach()
        parts = [
            torch.empty_like(mine) for _ in range(dist.get_world_size(wrapper.dp_process_group))
        ]
        dist.all_gather(parts, mine, group=wrapper.dp_process_group)
        flat = torch.cat(parts)[
            param.storage_offset() : param.storage_offset() + param.numel()
        ].view(param.shape)
        assert torch.equal(flat.to(param.dtype), param.detach()), (
            "the model does not hold what its masters hold"
        )
        return flat
    return safe_get_full_fp32_param(param)


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    get_accelerator().is_fp16_supported = lambda: (
        True
    )  # torch computes fp16 on any CPU; DeepSpeed asks for fast fp16
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=10), verbose=False)
    for case in cases:
        try:
            result = train(case)
        except Exception:
            result = {"error": traceback.format_exc()}
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case['name']}.pt")
        if "error" in result:
            print(f"case {case['name']}, rank {dist.get_rank()}: {result['error']}", flush=True)
        dist.barrier()
        deepspeed.utils.groups.mpu = None
    shutdown()


if __name__ == "__main__":
    main()
