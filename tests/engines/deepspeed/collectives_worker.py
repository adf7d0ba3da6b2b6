"""torchrun worker: counts the collectives of one optimizer step under ZeRO-1, 2 and 3 for few and
for many layers.

Where every matrix is measured (a rate that clips), and where the certificate settles all of them (a
tiny rate).
"""

from __future__ import annotations

import json

import deepspeed
import torch
import torch.distributed as dist

from weyl_megatron.engines.shutdown import shutdown


def collectives(stage: int, layers: int, lr: float) -> int:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *[torch.nn.Linear(15, 15, bias=False) for _ in range(layers)]
    )  # no half of it ends with a row
    for layer in net:
        torch.nn.init.orthogonal_(layer.weight)  # gradients of the first layers do not vanish
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW2", "params": {"lr": lr}},
        "zero_optimization": {"stage": stage},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=net, model_parameters=net.parameters(), config=config
    )
    optimizer, counted = engine.basic_optimizer, [0]
    step, names = (
        optimizer.step,
        [n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather", "send"))],
    )

    def counting_step() -> None:
        originals = {name: getattr(dist, name) for name in names}

        def counter(function: object) -> object:
            def call(*args: object, **kwargs: object) -> object:
                counted[0] += 1
                return function(*args, **kwargs)  # type: ignore[operator]

            return call

        for name, function in originals.items():
            setattr(dist, name, counter(function))
        step()
        for name, function in originals.items():
            setattr(dist, name, function)

    optimizer.step = counting_step
    for _ in range(3):  # the second and later steps are the usual ones
        counted[0] = 0
        engine.backward(engine(torch.randn(1, 15)).square().mean())
        with torch.no_grad():  # DeepSpeed before 0.19 needs it on gloo
            engine.step()
    stats = optimizer.stats().values()
    assert (
        all(entry.clipped for entry in stats)
        if lr == 1
        else all(entry.certified for entry in stats)
    )
    return counted[0]


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    table = {
        f"ZeRO-{stage}, {state}": [collectives(stage, layers, lr) for layers in (3, 49)]
        for stage in (1, 2, 3)
        for state, lr in (("measured", 1), ("settled", 1e-9))
    }
    if dist.get_rank() == 0:
        print("collectives " + json.dumps(table))
    shutdown()


if __name__ == "__main__":
    main()
