"""torchrun worker: watches two steps of torch's AdamW and of AdamW² under DeepSpeed, which clips
gradients; and what is said where a rank's partition is not understood.

Usage: zero_gradients_worker.py OUT_DIR CASE…
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from tests.logged import Lines
from tests.watch import plain_adamw
from tests.watch.plain_adamw import MODELS, exact_norms, gradients_of, loss_of
from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.watch.watch import Watch

#: One parameter to a sub-group of ZeRO-3, which are stepped one by one.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 2000}
CASES: dict[str, dict[str, Any]] = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}},
    "3": {"zero_optimization": ZERO3},
    "0-bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "2-bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "1-bf16-fp32": {  # BF16_Optimizer
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "3-offload": {"zero_optimization": {**ZERO3, "offload_optimizer": {"device": "cpu"}}},
}


#: Of these one model is enough.
ONLY_STACKED = ("0-bf16", "2-bf16", "1-bf16-fp32", "3-offload")
CLIP = 1.0


def started(case: str, which: str, kind: str) -> Any:
    params: dict[str, Any] = {"lr": 0.01, "eps": 1e-4}
    if kind == "adamw":
        params["torch_adam"] = True
    model = MODELS[which]()
    # Two parameter groups, each of which ZeRO flattens, and some of it steps, by itself.
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (0.0, 0.1)]
    for number, parameter in enumerate(model.parameters()):
        groups[number % 2]["params"].append(parameter)
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "optimizer": {"type": "AdamW2" if kind == "adamw2" else "AdamW", "params": params},
        "gradient_clipping": CLIP,
        **CASES[case],
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine


def exact_of(engine: Any) -> dict[str, float]:
    """Return the norms of the gradients as they are clipped."""
    gradients = gradients_of(engine.module)
    total = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    share = min(1.0, CLIP / total)
    return {tag: share * norm for tag, norm in exact_norms(gradients).items()}


def measured(case: str, which: str, kind: str) -> dict[str, Any]:
    engine = started(case, which, kind)
    watch = Watch(engine, every=1)
    exact: list[dict[str, float]] = []

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        if case == "0":
            exact.append(exact_of(engine))
        engine.step()

    steps = plain_adamw.steps(watch, lambda tokens: loss_of(engine, tokens), step)
    hooks = len(engine.basic_optimizer._optimizer_step_pre_hooks)
    return {"steps": steps, "exact": exact, "hooks": hooks}


def changed_on_one_rank() -> dict[str, Any]:
    """Return what is logged and measured where rank 1's weights are no longer its partition's."""
    engine = started("2-bf16", "separate", "adamw")
    if dist.get_rank() == 1:
        engine.module.blocks[2].attn.q.weight.data.add_(1.0)
    handler = Lines()
    said = handler.texts
    logging.getLogger("weyl_megatron").addHandler(handler)
    watch = Watch(engine, every=1)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    steps = plain_adamw.steps(watch, lambda tokens: loss_of(engine, tokens), step)
    return {"said": said, "tags": [tag for tag in steps[0] if "/grad_" in tag]}


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for case in sys.argv[2:]:
        for which in MODELS:
            if which == "separate" and case in ONLY_STACKED:
                continue
            for kind in ("adamw", "adamw2"):
                run = measured(case, which, kind)
                if dist.get_rank() == 0:
                    (folder / f"{case}-{which}-{kind}.json").write_text(json.dumps(run))
    if dist.get_world_size() == 2:
        said = changed_on_one_rank()
        if dist.get_rank() == 0:
            (folder / "changed.json").write_text(json.dumps(said))
    shutdown()


if __name__ == "__main__":
    main()
