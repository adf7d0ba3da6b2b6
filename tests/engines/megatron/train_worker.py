"""torchrun worker: trains tests/engines/megatron/gpt.py for every case of a list and saves what
came out.

Usage: train_worker.py CASES.json OUT_DIR
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import megatron_cpu, tolerances
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

import megatron.core.optimizer.distrib_optimizer as distributed  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.reference import AdamW2Reference, exact_sigma  # noqa: E402

# Adam makes ±1 of any gradient above eps: with 1e-8, rounding decides the sign of one that nearly
# vanishes.
RATE, BETAS, EPS, DECAY, TAU = 0.02, (0.9, 0.95), 1e-4, 0.1, 0.01


def optimizer_config(case: dict[str, Any]) -> OptimizerConfig:
    dtype = gpt.DTYPES[case.get("dtype", "fp32")]
    return OptimizerConfig(
        optimizer=case.get("optimizer", "adamw2"),
        lr=RATE,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=0.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        initial_loss_scale=2.0**8,
        params_dtype=dtype,
        use_distributed_optimizer=case.get("dist_opt", False),
        overlap_param_gather=case.get("overlap", False),
        overlap_param_gather_with_optimizer_step=case.get("overlap_step", False),
        **{
            key: gpt.DTYPES[value] if key.endswith("_dtype") else value
            for key, value in case.get("config", {}).items()
        },
    )


def train(case: dict[str, Any]) -> dict[str, Any]:
    gpt.start(case)
    if case.get("enable", True):
        megatron.enable(**{"tau": TAU, **case.get("options", {})})
    model = gpt.build(case)
    # "fused_adam": as where Transformer Engine or apex is installed, neither of which runs on a
    # CPU.
    adam, distributed.Adam = (
        distributed.Adam,
        torch.optim.SGD if case.get("fused_adam") else distributed.Adam,
    )
    optimizer = get_megatron_optimizer(optimizer_config(case), model)
    distributed.Adam = adam
    get_model_config(model[0]).grad_scale_func = optimizer.scale_loss
    before: dict[str, torch.Tensor] = {}
    for step in range(gpt.STEPS):
        optimizer.zero_grad()
        gpt.backward(step, case, model)
        if step == gpt.STEPS - 1:
            before = gpt.whole(case, model)
        successful, _, _ = optimizer.step()
        assert successful
    if case.get("overlap"):
        for chunk in model:
            chunk.start_param_sync(force_sync=True)
    # Megatron-FSDP's optimizer is in no chain where it is alone.
    wrappers = getattr(optimizer, "chained_optimizers", [optimizer])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyone, {name: tuple(entry) for name, entry in megatron.stats(optimizer).items()}
    )
    return {
        "weights": gpt.whole(case, model),
        "stats": everyone,
        "exact": exact(before, case),
        "wrappers": [type(wrapper).__name__ for wrapper in wrappers],
        "inner": type(wrappers[0].optimizer).__name__,
    }


def exact(weights: dict[str, torch.Tensor], case: dict[str, Any]) -> dict[str, float]:
    """Return σ₁ of every matrix by singular value decomposition."""
    parts = [
        part for name, full in weights.items() for part in gpt.matrices(name, full, case).items()
    ]
    return {name: exact_sigma(matrix) for name, matrix in parts}


def reference(case: dict[str, Any]) -> dict[str, Any]:
    """Train with Megatron's gradients on one process, and the reference on fp32 copies of the
    unfused matrices.
    """
    gpt.start(case)
    model = gpt.build(case)
    params = dict(gpt.named(case, model))
    masters: dict[str, torch.Tensor] = {}
    for name, p in params.items():
        masters |= gpt.matrices(name, p.detach().float().clone(), case) or {
            name: p.detach().float().clone()
        }
    optimizer = AdamW2Reference(masters.items(), RATE, BETAS, EPS, DECAY, TAU)
    rates: dict[str, float] = {}
    for step in range(gpt.STEPS):
        gpt.backward(step, case, model)
        for name, p in params.items():
            gradient = p.main_grad.float()
            for part, piece in (gpt.matrices(name, gradient, case) or {name: gradient}).items():
                masters[part].grad = piece.clone()
        rates = optimizer.step()
        with torch.no_grad():
            for name, p in params.items():
                parts = {part: masters[part] for part in gpt.matrices(name, p, case) or {name: p}}
                p.copy_(gpt.unite(name, parts, case))
    return {"weights": {name: p.detach().clone() for name, p in params.items()}, "rates": rates}


def run(act: Callable[[dict[str, Any]], dict[str, Any]], out: Path) -> None:
    """Save what ``act`` makes of every case of the list that the command line names, or how it
    failed.
    """
    tolerances.make_every_iteration()  # so that no rounding decides on one
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = act(case)
        except Exception:
            result = {"error": traceback.format_exc()}
            print(f"case {case['name']}, rank {dist.get_rank()}: {result['error']}", flush=True)
        if dist.get_rank() == 0:
            torch.save(result, out / f"{case['name']}.pt")
        dist.barrier()
    gpt.stop()
    shutdown()


def main() -> None:
    run(lambda case: reference(case) if case.get("reference") else train(case), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
