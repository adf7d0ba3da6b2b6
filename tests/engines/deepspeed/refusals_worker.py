"""torchrun worker: configurations that AdamW2 must refuse under DeepSpeed, each with the sentence
that it raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

from tests import net as nets
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

CASES: dict[str, dict[str, Any]] = {
    "unknown key": {"optimizer": {"tua": 0.01}},
    "max_grad_norm": {"optimizer": {"max_grad_norm": 1.0}},
    "adam_w_mode": {"optimizer": {"adam_w_mode": False}},
    "clip": {"optimizer": {"clip": "svd"}},
    "clip null": {"optimizer": {"clip": None}},
    "vectors": {"optimizer": {"clip": "project", "vectors": 2.5}},
    "vectors a string": {"optimizer": {"clip": "project", "vectors": "8"}},
    "vectors for nothing": {"optimizer": {"vectors": 8}},
    "vectors of an override": {
        "optimizer": {"overrides": [{"match": "up*", "clip": "project", "vectors": 65}]}
    },
    "moved weights": {"zero": {"stage": 2}, "move": True},
    "unknown wrapper": {"zero": {"stage": 2}, "rename": True},
    "another layout": {"zero": {"stage": 2}, "turn": True},
}

_BF16 = {"enabled": True, "bf16_master_weights_and_grads": True}

#: DeepSpeed's modes that step weights by an Adam of their own.
MODES: dict[str, dict[str, Any]] = {
    "zenflow": {
        "zero": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "zenflow": {"overlap_step": False},
        }
    },
    "zenflow 3": {
        "zero": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "zenflow": {"overlap_step": False},
        }
    },
    "superoffload": {
        "zero": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}
    },
    "superoffload alone": {
        "zero": {"stage": 3, "offload_optimizer": {"device": "none", "super_offload": True}}
    },
    "ratio": {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
    "bf16 masters": {"zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": _BF16},
    "bf16 masters 3": {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "bf16": _BF16},
    "bf16 states": {
        "zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "bf16": {**_BF16, "bf16_optimizer_states": True},
    },
    "bf16 masters alone": {"zero": {"stage": 2}, "bf16": _BF16},
    "fp16 masters": {
        "zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "fp16": {"enabled": True, "fp16_master_weights_and_grads": True},
    },
    "forced": {
        "zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": True,
    },
    # These work.
    "offload 1": {"zero": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "offload 2": {"zero": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "offload 3": {"zero": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    "bf16 all": {"zero": {"stage": 2}, "bf16": {**_BF16, "bf16_optimizer_states": True}},
}
if tuple(map(int, deepspeed.__version__.split(".")[:2])) < (0, 19):
    _FILES = {"device": "nvme", "nvme_path": "/tmp"}
    MODES["nvme"] = {"zero": {"stage": 3, "offload_optimizer": _FILES}}


def is_known(case: dict[str, Any]) -> bool:
    """Whether this release of DeepSpeed has what the case configures."""
    found = DeepSpeedConfig({"train_batch_size": 1}, mpu=None)
    offload = DeepSpeedZeroOffloadOptimizerConfig.model_fields
    return (
        all(hasattr(found.zero_config, key) for key in case["zero"])
        and all(key in offload for key in case["zero"].get("offload_optimizer", {}))
        and all(
            hasattr(getattr(found, "bfloat16_config", None), key) for key in case.get("bf16", {})
        )
        and all(
            hasattr(getattr(found, "float16_config", None), key) for key in case.get("fp16", {})
        )
    )


def make_engine(case: dict[str, Any], by: str) -> Any:
    options = {"lr": 1e-3, **case.get("optimizer", {})}
    config = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "zero_optimization": case.get("zero", {}),
        "steps_per_print": 10**9,
        **{
            key: case[key] for key in ("bf16", "fp16", "zero_force_ds_cpu_optimizer") if key in case
        },
    }
    net = nets.make_net()
    given: dict[str, Any] = {"model_parameters": net.parameters()}
    if by == "client":
        given = {"optimizer": AdamW2(net.named_parameters(), **options)}
    elif by == "callable":
        given["optimizer"] = lambda params: AdamW2(params, **options)
    elif by == "callable of another":  # beside an AdamW2 that was made of the same parameters
        beside = AdamW2(net.parameters(), **options)
        given["optimizer"] = lambda params: torch.optim.SGD(params, beside.defaults["lr"])
    else:
        config["optimizer"] = {"type": "AdamW2", "params": options}
    return deepspeed.initialize(model=net, config=config, **given)[0]


def refuse(case: dict[str, Any], by: str = "json") -> str:
    """Return what is said while the engine is built, or in its first step, after the place where it
    was said.
    """
    where, renamed = "built", None
    try:
        engine = make_engine(case, by)
        where = "stepped"
        if case.get("move"):
            with torch.no_grad():
                engine.module.head.weight.add_(1.0)
        if case.get("rename"):
            # A wrapper of a later DeepSpeed that this release of AdamW2 has never seen.
            renamed = type(engine.optimizer), type(engine.optimizer).__name__
            renamed[0].__name__ = "ZeroOptimizerOfTheFuture"
        engine.backward(engine(nets.batches(1)[0, 0, 0]))
        engine.step()
        steps = {int(state["step"]) for state in engine.basic_optimizer.state.values()}
        return f"{type(engine.basic_optimizer).__name__} made {steps} steps"
    except Exception as error:
        return f"{where}: {type(error).__name__}: {error}"
    finally:
        if renamed is not None:
            renamed[0].__name__ = renamed[1]


@contextmanager
def turned() -> Iterator[None]:
    """Let DeepSpeed lay its partitions out from behind, as a later release might."""
    module = deepspeed.runtime.engine
    known = module.DeepSpeedZeroOptimizer

    class DeepSpeedZeroOptimizer(known):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for partition in self.single_partition_of_fp32_groups:
                partition.data.copy_(partition.data.flip(0))

    module.DeepSpeedZeroOptimizer = DeepSpeedZeroOptimizer
    try:
        yield
    finally:
        module.DeepSpeedZeroOptimizer = known


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    said = {}
    for name, case in CASES.items():
        if case.get("turn"):
            with turned():
                said[name] = refuse(case)
        else:
            said[name] = refuse(case)
    known = {name: case for name, case in MODES.items() if is_known(case)}
    modes = {
        name: {by: refuse(case, by) for by in ("json", "client", "callable")}
        for name, case in known.items()
    }
    print("refusals " + json.dumps(said))
    print("modes " + json.dumps(modes))
    print("another " + json.dumps({"said": refuse(MODES["offload 2"], "callable of another")}))
    shutdown()


if __name__ == "__main__":
    main()
