"""torchrun worker, 2 ranks: DeepSpeed's tensor-fragment API before and between steps, with AdamW2
and with AdamW.

Usage: fragments_worker.py OUT_DIR STAGE-DTYPE…. Every case is trained three times: with AdamW2 at a
τ that clips, with AdamW2 at τ = ∞, and with torch's AdamW as DeepSpeed makes it. Each run writes
what the API gave, and the weights it ended at.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)

from tests import net as nets
from tests import tolerances
from weyl_megatron.engines.shutdown import shutdown

STEPS, MOMENTS = 6, ("exp_avg", "exp_avg_sq")

#: What gradients are multiplied by, per step.
GRADIENTS = {4: {"up.weight": 2.0, "head.weight": -1.0}}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "clipped": {"type": "AdamW2", "params": nets.OPTIONS},
    "unbounded": {"type": "AdamW2", "params": {**nets.OPTIONS, "tau": math.inf}},
    "adamw": {
        "type": "AdamW",
        "params": {k: v for k, v in nets.OPTIONS.items() if k != "tau"} | {"torch_adam": True},
    },
}


def cases() -> Iterator[tuple[int, str]]:
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16"):
            yield stage, dtype


def reversed_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.flip(0)


def edits(step: int) -> dict[str, Any]:
    """What is done to which parameter before a step, counted from 0: the same function everywhere,
    of the old value.
    """
    if step == 0:
        return {
            "up.weight": reversed_rows,
            "head.weight": lambda w: torch.zeros_like(w),
            "up.bias": lambda b: b + 1,
        }
    if step == 3:
        return {"down.weight": lambda w: 3 * w, "norm.weight": lambda g: g - 0.5}
    return {}


def state_edits(step: int) -> dict[str, Any]:
    return (
        {"embed.weight": lambda state: 0.25 * state, "up.bias": torch.zeros_like}
        if step == 3
        else {}
    )


def own(param: Any, piece: torch.Tensor) -> torch.Tensor:
    """The part of this rank's piece of a parameter that is not padding, of which nobody says what
    it holds.
    """
    return piece[: max(0, param.ds_numel - dist.get_rank() * piece.numel())].clone()


def everything(engine: Any, stage: int, has_state: bool) -> dict[str, torch.Tensor]:
    """What the API gives of all parameters, gradients included where a backward pass has just been
    made.
    """
    found: dict[str, torch.Tensor] = {}
    for name, param in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(param).clone()
        for key in MOMENTS if has_state else ():
            found[f"{name} {key}"] = safe_get_full_optimizer_state(param, key).clone()
        if stage == 3:
            found[f"{name} local"] = own(param, safe_get_local_fp32_param(param))
            for key in MOMENTS if has_state else ():
                found[f"{name} local {key}"] = own(
                    param, safe_get_local_optimizer_state(param, key)
                )
    return found


def gradients(engine: Any, stage: int) -> dict[str, torch.Tensor]:
    found = {
        f"{name} grad": safe_get_full_grad(p).clone()
        for name, p in engine.module.named_parameters()
    }
    if stage == 3:
        found |= {
            f"{name} local grad": own(p, safe_get_local_grad(p))
            for name, p in engine.module.named_parameters()
        }
    return found


def edit(engine: Any, stage: int, step: int) -> None:
    named = dict(engine.module.named_parameters())
    for number, (name, change) in enumerate(edits(step).items()):
        param = named[name]
        if (
            stage == 3 and number and change is not reversed_rows
        ):  # these are the same on a piece and on the whole
            safe_set_local_fp32_param(param, change(safe_get_local_fp32_param(param)))
        else:
            safe_set_full_fp32_param(param, change(safe_get_full_fp32_param(param)))
    for number, (name, change) in enumerate(state_edits(step).items()):
        for key in MOMENTS:
            if stage == 3 and number:
                local = safe_get_local_optimizer_state(named[name], key)
                safe_set_local_optimizer_state(named[name], change(local), key)
            else:
                safe_set_full_optimizer_state(
                    named[name], change(safe_get_full_optimizer_state(named[name], key)), key
                )


def edit_gradients(engine: Any, stage: int, step: int) -> None:
    named = dict(engine.module.named_parameters())
    for number, (name, factor) in enumerate(GRADIENTS.get(step, {}).items()):
        if stage == 3 and number:
            safe_set_local_grad(named[name], factor * safe_get_local_grad(named[name]))
        else:
            safe_set_full_grad(named[name], factor * safe_get_full_grad(named[name]))


def train(stage: int, dtype: str, optimizer: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "optimizer": OPTIMIZERS[optimizer],
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bf16"},
    }
    net = nets.make_net()
    # One group: at ZeRO-1 and 2 the API finds the state of the first one alone (DeepSpeed 0.19.8,
    # with its AdamW, too).
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    seen = [everything(engine, stage, has_state=False)]
    for step, batch in enumerate(nets.batches(dist.get_world_size())[:STEPS, 0]):
        edit(engine, stage, step)
        seen.append(everything(engine, stage, has_state=step > 0))
        engine.backward(engine(batch[dist.get_rank()]))
        seen.append(gradients(engine, stage))
        edit_gradients(engine, stage, step)
        engine.step()
        seen.append(everything(engine, stage, has_state=True))
    stats = getattr(engine.basic_optimizer, "stats", dict)()
    return {
        "seen": seen,
        "weights": {name: seen[-1][name] for name, _ in engine.module.named_parameters()},
        "stats": {name: tuple(entry) for name, entry in stats.items()},
        "stepped": type(engine.basic_optimizer).__name__,
    }


def main() -> None:
    tolerances.make_every_iteration()  # so that no rounding decides on one
    out = Path(sys.argv[1])
    chosen = [(int(case[0]), case[2:]) for case in sys.argv[2:]]
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage, dtype in chosen:
        result: dict[str, Any]
        try:
            result = {optimizer: train(stage, dtype, optimizer) for optimizer in OPTIMIZERS}
        except Exception:
            result = {"error": traceback.format_exc()}
            print(f"stage {stage}, {dtype}: {result['error']}", flush=True)
        torch.save(result, out / f"{stage}-{dtype}-{dist.get_rank()}.pt")
    shutdown()


if __name__ == "__main__":
    main()
