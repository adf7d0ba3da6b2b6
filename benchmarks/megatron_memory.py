"""What training under Megatron keeps, in bytes a parameter, by its options that save memory.

    python -m benchmarks.megatron_memory [BLOCKS]

One process on a CPU trains blocks of GPT-2 124M (6) for two steps with the distributed optimizer,
in bfloat16; then everything that is alive and was not before is counted, each storage once: after
the step, and again after ``zero_grad``, as while the model computes. With N data-parallel ranks a
rank has an Nth of all but weights and gradients. What is in the host's memory under
``--optimizer-cpu-offload`` is told apart by its role: on a CPU there is no device. Megatron's own
precision-aware optimizer is Transformer Engine's FusedAdam, which takes a GPU: it is not here.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Container, Iterable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests import megatron_cpu

megatron_cpu.install()

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402
from weyl_megatron.engines.shutdown import shutdown  # noqa: E402

#: Of GPT-2 124M, six of its blocks, and a vocabulary that does not outweigh them.
SHAPE = {"HIDDEN": 768, "HEADS": 12, "WIDTH": 64, "GROUPS": 12, "FFN": 3072, "VOCAB": 8192}
STEPS = 2

_NARROW = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
_PRECISE = {"use_precision_aware_optimizer": True}
_OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}

#: By what the table says: the optimizer and its configuration.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "Megatron's Adam": ("adam", {}),
    "AdamW²": ("adamw2", {}),
    "AdamW², precision-aware, M and V in bf16": ("adamw2", {**_PRECISE, **_NARROW}),
    "… gradients in bf16, too": (
        "adamw2",
        {**_PRECISE, **_NARROW, "main_grads_dtype": torch.bfloat16},
    ),
    "AdamW², CPU offload": ("adamw2", _OFFLOAD),
    "… precision-aware, M, V and gradients in bf16": (
        "adamw2",
        {**_OFFLOAD, **_PRECISE, **_NARROW, "main_grads_dtype": torch.bfloat16},
    ),
}


class Kept(NamedTuple):
    """Bytes a parameter."""

    weights: float
    gradients: float
    masters: float
    moments: float
    beyond: float  # power vectors and all else
    in_step: float  # gone with zero_grad
    on_host: float  # of all of it


def measure(blocks: int, name: str, config: dict[str, Any]) -> Kept:
    """Train with an optimizer of Megatron's name, and count."""
    case = {"layers": blocks, "dtype": "bf16", "dist_opt": True, "micros": 1, "config": {}}
    if config.get("main_grads_dtype") is torch.bfloat16:
        case["config"] = {"main_grads_dtype": "bf16"}
    gpt.start(case)
    before = set(_storages(_alive()))
    model = gpt.build(case)
    options = OptimizerConfig(
        optimizer=name,
        lr=1e-2,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        **config,
    )
    optimizer = get_megatron_optimizer(options, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        gpt.backward(step, case, model)
        optimizer.step()
    gc.collect()
    params = [param for chunk in model for param in chunk.parameters()]
    count = sum(param.numel() for param in params)
    states = optimizer.chained_optimizers[0].optimizer
    of_states = list(states.state.values())
    masters = [p for group in states.param_groups for p in group["params"]]
    masters += [state["master_param"] for state in of_states if "master_param" in state]
    moments = [state[key] for state in of_states for key in ("exp_avg", "exp_avg_sq")]
    roles = [params, [param.main_grad for param in params], masters, moments]
    with_step = sum(_new(_alive(), before).values())
    optimizer.zero_grad()
    gc.collect()
    sizes = []
    for tensors in (*roles, _alive()):
        new = _new(tensors, before)
        before |= new.keys()
        sizes.append(sum(new.values()) / count)
    is_offloaded = config.get("optimizer_cpu_offload", False)
    on_host = sum(sizes[2:]) if is_offloaded else 0.0
    return Kept(*sizes, in_step=with_step / count - sum(sizes), on_host=on_host)


def _new(tensors: Iterable[Tensor], before: Container[int]) -> dict[int, int]:
    return {at: size for at, size in _storages(tensors).items() if at not in before}


def _alive() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [each for each in gc.get_objects() if isinstance(each, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return where storages lie, and how many bytes they are."""
    held = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def main(blocks: str = "6") -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    megatron.enable(tau=0.01)
    print("| | weights | gradients | masters | M, V | beyond | in a step | on the host |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with patch.multiple(gpt, **SHAPE):
        for label, (name, config) in ROWS.items():
            kept = measure(int(blocks), name, config)
            numbers = (f"{number:.2f}" for number in kept)
            print(f"| {label} | {' | '.join(numbers)} |", flush=True)
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
