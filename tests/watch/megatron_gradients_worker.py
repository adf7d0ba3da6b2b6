"""torchrun worker: watches two steps of tests/engines/megatron/gpt.py with Megatron's own Adam and
with AdamW²; at one process also takes gradients and logits by plain indexing.

Usage: megatron_gradients_worker.py OUT_DIR CASE…
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import megatron_cpu
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from tests.watch.plain_adamw import exact_logits  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.watch.watch import Watch  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "one-bf16": {"dtype": "bf16"},
    "tp2": {"tp": 2},
    "tp2-bf16": {"tp": 2, "dtype": "bf16"},
    "tp2-sp": {"tp": 2, "sp": True},
    "tp2-unsplit": {"tp": 2, "split_fused": False},  # of AdamW²: linear_qkv is one matrix
    "pp2": {"pp": 2},
    "dp2": {},
    "dp2-distopt": {"dist_opt": True},
    "dp2-distopt-bf16": {"dist_opt": True, "dtype": "bf16"},
    "vpp2-distopt": {"pp": 2, "vpp": 2, "dist_opt": True},
}


def exact_norms(case: dict[str, Any], model: list[Any]) -> dict[str, float]:
    norms = {}
    for name, param in gpt.named(case, model):
        if "linear_qkv" in name and param.dim() == 2:
            number = name.split(".layers.")[1].split(".")[0]
            for matrix, rows in gpt.matrices(name, param.main_grad.double(), case).items():
                norms[f"block/{number}/grad_{matrix[-2]}"] = float(rows.norm())
    return norms


def logits_of(model: list[Any]) -> dict[str, float]:
    """Take logits of the next forward pass, in the dictionary that is returned."""
    logits: dict[str, float] = {}

    def look(number: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            q, k = (tensor.detach().permute(1, 2, 0, 3) for tensor in args[:2])
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            for tag, value in exact_logits(number, q, k):
                logits.setdefault(tag, value)  # of several micro-batches the first

        return hook

    for number, layer in enumerate(model[0].module.decoder.layers):
        core = layer.self_attention.core_attention
        core.register_forward_pre_hook(look(number), with_kwargs=True)
    return logits


def measured(name: str, kind: str) -> dict[str, Any]:
    case = CASES[name]
    gpt.start(case)
    megatron.enable(tau=0.01, split_fused=case.get("split_fused", True))
    model = gpt.build(case)
    config = OptimizerConfig(
        optimizer=kind,
        lr=0.01,
        adam_eps=1e-4,
        clip_grad=0.0,
        bf16=case.get("dtype") == "bf16",
        use_distributed_optimizer=case.get("dist_opt", False),
    )
    optimizer = get_megatron_optimizer(config, model)
    get_model_config(model[0]).grad_scale_func = optimizer.scale_loss
    logits = logits_of(model) if name == "one" else {}
    watch = Watch(model, optimizer, every=1)
    steps: list[dict[str, float]] = []
    exact: list[dict[str, float]] = []
    for step in range(2):
        optimizer.zero_grad()
        gpt.backward(step, case, model)
        if name.startswith("one"):
            exact.append(exact_norms(case, model))
        optimizer.step()
        steps.append(dict(watch.step()))
    watch.close()
    return {"steps": steps, "exact": exact, "logits": logits}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        for kind in ("adam", "adamw2"):
            run = measured(name, kind)
            if dist.get_rank() == 0:
                (folder / f"{name}-{kind}.json").write_text(json.dumps(run))
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
