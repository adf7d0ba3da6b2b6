"""torchrun worker: asks megatron-core for AdamW2 in ways that cannot be right, and prints what is
said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests import megatron_cpu
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.engines.megatron import adapter  # noqa: E402


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except (ValueError, AssertionError) as error:
        return str(error)
    return "nothing"


def main() -> None:
    dist.init_process_group("gloo")
    gpt.start({})
    found = {
        "tau": said(lambda: megatron.enable(tau=-1)),
        "split_fused": said(lambda: megatron.enable(split_fused="no")),  # type: ignore[arg-type]
    }
    megatron.enable()
    model = gpt.build({})

    def config() -> OptimizerConfig:
        return OptimizerConfig(optimizer="adamw2", lr=0.01, clip_grad=0.0)

    for key, value in {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "decoupled_weight_decay": False,
    }.items():
        changed = config()
        setattr(changed, key, value)
        found[key] = said(lambda changed=changed: get_megatron_optimizer(changed, model))  # type: ignore[misc]
    precise = {"use_precision_aware_optimizer": True}
    # As a user writes it, the constructor itself would say that it takes adam alone.
    for key, beside in {
        "exp_avg_dtype": {**precise, "exp_avg_dtype": torch.float16},
        "exp_avg_sq_dtype": {**precise, "exp_avg_sq_dtype": torch.uint8},
        "main_params_dtype": {**precise, "main_params_dtype": torch.float16},
        "optimizer_offload_fraction": {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": 0.5,
        },
        "main_grads_dtype": {"main_grads_dtype": torch.bfloat16},
    }.items():
        found[f"{key} at once"] = said(
            lambda beside=beside: OptimizerConfig(
                optimizer="adamw2", use_distributed_optimizer=True, **beside
            )  # type: ignore[misc]
        )
    # Of 0.19, which cuts weights further than tensor parallelism does: its configuration, and its
    # mark on a parameter.
    for key in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"):
        setattr(model[0].config, key, 2)
        found[key] = said(lambda: get_megatron_optimizer(config(), model))
        setattr(model[0].config, key, 1)
    cut = next(p for p in model[0].parameters() if p.dim() == 2)
    cut.is_gtp_weight_remat = True
    found["is_gtp_weight_remat"] = said(lambda: get_megatron_optimizer(config(), model))
    cut.is_gtp_weight_remat = False
    model[0].ddp_config.use_megatron_fsdp = True
    found["use_megatron_fsdp"] = said(lambda: adapter._refuse(config(), model))
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
    beside = OptimizerConfig(optimizer="adamw2", use_distributed_optimizer=True, **offload)
    found["optimizer_cpu_offload and FSDP"] = said(lambda: adapter._refuse(beside, model))
    model[0].ddp_config.use_megatron_fsdp = False
    wrapped = type("TorchFullyShardedDataParallel", (nn.Module,), {})()
    wrapped.ddp_config = model[0].ddp_config
    found["torch FSDP2"] = said(lambda: adapter._refuse(config(), [wrapped]))

    megatron.enable(overrides=[{"match": "*.nothing", "tau": 0.1}])
    optimizer = get_megatron_optimizer(config(), model)
    gpt.backward(0, {}, model)
    found["override"] = said(optimizer.step)
    OptimizerConfig.adamw2_tau = 0.01  # what patches/ adds
    found["patched"] = said(megatron.enable)
    print(f"refusals {json.dumps(found)}", flush=True)
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
