"""torchrun worker, 2 ranks: a NaN in one element of one gradient on one rank, under DeepSpeed."""

from __future__ import annotations

import logging
import math
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from examples.collapse.model import GPT, GPTConfig
from weyl_megatron.engines.shutdown import shutdown

STEPS, BAD = 5, (1, 3)


def tokens(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    text = torch.randint(256, (2, 17), generator=generator)
    return text[:, :-1], text[:, 1:]


def run(
    config: dict[str, Any],
    value: float | None,
    skipped: int = len(BAD),
    steps: int = STEPS,
    bad: tuple[int, ...] = BAD,
    stats: dict[str, Any] | None = None,
) -> list[Tensor]:
    """Train; on the steps in ``bad``, put ``value`` into a gradient on rank 1, or leave them out
    where it is None.

    So many steps as ``skipped`` says are not made then. ``stats`` gets what the last step says.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=1, context=16, width=32))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    poisoned = [False]

    def poison(grad: Tensor) -> Tensor:
        if poisoned[0] and dist.get_rank() == 1:
            grad = grad.clone()
            grad.view(-1)[3] = value
        return grad

    parameter = dict(model.named_parameters())["blocks.0.attn.q.weight"]
    parameter.register_hook(poison)
    for step in range(steps):
        poisoned[0] = step in bad
        if step in bad and value is None:
            continue
        loss = engine(*tokens(step))
        engine.backward(loss)
        engine.step()
    ours = engine.basic_optimizer
    count = getattr(ours, "skipped_steps", skipped)
    assert count == (0 if value is None else skipped), count
    found = []
    for one in model.parameters():
        if isinstance(engine.optimizer, type(ours)):
            found += [one.detach().clone(), ours.state[one]["exp_avg"].clone()]
        else:
            found += [
                safe_get_full_fp32_param(one).clone(),
                safe_get_full_optimizer_state(one, "exp_avg").clone(),
            ]
    if stats is not None:
        stats.update(ours.stats())
    engine.destroy()
    return found


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    options = (
        {"lr": 0.01, "tau": 0.05, "nonfinite": "skip"} if stage == 0 else {"lr": 0.01, "tau": 0.05}
    )
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW2", "params": options},
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        **more,
    }


CASES = {
    **{f"zero{stage}": config_of(stage) for stage in range(4)},
    **{f"zero{stage}-bf16": config_of(stage, bf16={"enabled": True}) for stage in (1, 2, 3)},
    "zero2-offload": config_of(2, zero={"offload_optimizer": {"device": "cpu"}}),
    "zero1-unclipped": config_of(1, gradient_clipping=0.0),
}


#: DeepSpeed's own key: steps are made, whatever the gradients hold.
OFF = {"bf16": {"enabled": True, "check_grad_overflow": False}}


def check_that_the_engine_s_key_wins(stage: int) -> str:
    """Compare what becomes of NaN, where the configuration itself asks for no check, with
    DeepSpeed's AdamW.
    """
    theirs = config_of(stage, **OFF)
    theirs["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    expected = run(theirs, float("nan"))
    unbounded, clipped, told = (config_of(stage, **OFF) for _ in range(3))
    for config, options in (
        (unbounded, {"tau": math.inf}),
        (clipped, {}),
        (told, {"nonfinite": "skip"}),
    ):
        config["optimizer"]["params"] = {"lr": 0.01, "tau": 0.05, **options}
    # ZeRO-3 has its check all the same, under AdamW as well.
    skipped = 0 if any(one.isnan().any() for one in expected) else len(BAD)
    found = run(unbounded, float("nan"), skipped)
    same = all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(found, expected, strict=True)
    )
    bounded = run(clipped, float("nan"), skipped)
    # A matrix has one σ₁(U): one NaN in it reaches all of the matrix.
    same &= all(
        bool((a.isnan() >= b.isnan()).all()) for a, b in zip(bounded, expected, strict=True)
    )
    assert not any(one.isnan().any() for one in run(told, float("nan")))
    return f"as AdamW, {skipped} skipped" if same else "DIFFERS"


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    logging.basicConfig(level=logging.WARNING)
    for name, config in CASES.items():
        without = run(config, None)
        for value in (float("nan"), float("inf")):
            with_it = run(config, value)
            same = all(torch.equal(one, other) for one, other in zip(without, with_it, strict=True))
            everyone: list[Any] = [None, None]
            dist.all_gather_object(everyone, same)
            if dist.get_rank() == 0:
                print(
                    f"{name}, {value}: "
                    + ("as without that step" if all(everyone) else f"DIFFERS {everyone}")
                )
    for stage in (1, 2, 3):  # without ZeRO DeepSpeed always skips
        everyone = [None, None]
        dist.all_gather_object(everyone, check_that_the_engine_s_key_wins(stage))
        if dist.get_rank() == 0:
            print(f"zero{stage} without a check: {' and '.join(sorted(set(everyone)))}")
    shutdown()


if __name__ == "__main__":
    main()
