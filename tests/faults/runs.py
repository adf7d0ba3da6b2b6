"""What the workers here train: a tiny GPT under DeepSpeed, on the same global batch with any number
of ranks.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from examples.collapse.model import GPT, GPTConfig

SHAPE = GPTConfig(norm="pre", vocabulary=61, context=12, layers=2, heads=2, width=22)
GLOBAL_BATCH = 6  # of which 1, 2 and 3 ranks take equal parts

#: A rate at which τ clips most matrices; in the second block τ is so large that the certificate
#: settles them.
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": [0.9, 0.95], "weight_decay": 0.1, "tau": 0.01}
OVERRIDES = [{"match": "blocks.1.*", "tau": 3.0}]


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed config of a case: ``stage``, and what else it names."""
    zero: dict[str, Any] = {"stage": case["stage"], **case.get("zero", {})}
    if case.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    kind = case.get("optimizer", "AdamW2")
    own = {"overrides": OVERRIDES} if kind == "AdamW2" else {"torch_adam": True}
    params = {**OPTIONS, **own, **case.get("params", {})}
    if kind != "AdamW2":
        del params["tau"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "optimizer": {"type": kind, "params": params},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": case.get("universal", False)},
    }
    if case.get("dtype") == "bf16":
        config["bf16"] = {"enabled": True}
    if case.get("grad_dtype"):
        config["data_types"] = {"grad_accum_dtype": case["grad_dtype"]}
    return config


def engine(case: dict[str, Any]) -> Any:
    """Return a new engine, with two parameter groups, as most recipes have: with weight decay and
    without.
    """
    torch.manual_seed(0)
    model = GPT(SHAPE)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return deepspeed.initialize(model=model, model_parameters=groups, config=config_of(case))[0]


def batch(step: int) -> Tensor:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(SHAPE.vocabulary, (GLOBAL_BATCH, SHAPE.context + 1), generator=generator)


def train_step(engine: Any, step: int) -> float:
    """Make a step on this rank's part of the global batch; return its loss there."""
    tokens = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
    loss = F.cross_entropy(engine(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    return loss.item()
