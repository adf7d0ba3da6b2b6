"""torchrun worker: models that wrappers renamed, and optimizers that were made before DeepSpeed was
imported.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from tests import net as nets
from tests.engines.said import Said
from weyl_megatron import AdamW2

EARLY_NET = nets.make_net()
EARLY = AdamW2(EARLY_NET.named_parameters(), **nets.OPTIONS)  # before DeepSpeed is there

import deepspeed  # noqa: E402
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # noqa: E402

from weyl_megatron.engines.shutdown import shutdown  # noqa: E402

OVERRIDES = [{"match": "up.weight", "tau": 0.5}, {"match": "he?d.weight", "exempt": True}]


class Odd(nn.Module):
    """Has a layer that is called as wrappers call the whole model, and without it one of the same
    name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.module = nets.make_net()
        self.up = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.module(tokens)
        return loss + self.up.weight.square().sum() + self.up.bias.sum()


def wrapped(kind: str) -> nn.Module:
    net: Any = nets.make_net()
    if kind == "compiled":
        return torch.compile(net, backend="eager")  # type: ignore[no-any-return]
    if kind == "compiled in place":
        net.compile(backend="eager")
    if kind == "layer compiled":
        net.up = torch.compile(net.up, backend="eager")
    if kind == "checkpointed":
        net.up, net.down = checkpoint_wrapper(net.up), checkpoint_wrapper(net.down)
    return net  # type: ignore[no-any-return]


def train(net: nn.Module, stage: int, params: dict[str, Any] | None = None, **given: Any) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "zero_optimization": {"stage": stage},
    }
    if params is not None:
        config["optimizer"] = {"type": "AdamW2", "params": {**nets.OPTIONS, **params}}
        given["model_parameters"] = net.parameters()
    if "optimizer" in given and not isinstance(given["optimizer"], AdamW2):
        config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=net, config=config, **given)
    for batch in nets.batches(1)[:2, 0, 0]:
        engine.backward(engine(batch))
        engine.step()
    return engine


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    said = Said()
    logging.getLogger("weyl_megatron").addHandler(said)
    found: dict[str, Any] = {}
    for kind in ("plain", "compiled", "compiled in place", "layer compiled", "checkpointed"):
        # DeepSpeed 0.19.8 itself does not train a module in torch.compile's under ZeRO-3
        # ('_in_forward').
        for stage in (0, 1, 2) if kind in ("compiled", "layer compiled") else (0, 1, 2, 3):
            for params in ({"overrides": OVERRIDES}, {"tau": "balanced"}):
                stats = train(wrapped(kind), stage, params).basic_optimizer.stats()
                found[f"{kind}, ZeRO-{stage}, {next(iter(params))}"] = {
                    n: [e.tau, e.lr] for n, e in stats.items()
                }
    found["odd"] = sorted(train(Odd(), 2, {"overrides": [OVERRIDES[0]]}).basic_optimizer.stats())
    early = train(EARLY_NET, 1, optimizer=EARLY)
    found["early"] = [int(next(iter(early.basic_optimizer.state.values()))["step"]), said.lines[:]]

    net = nets.make_net()
    ignored, same = (
        AdamW2(net.parameters(), lr=0.1),
        AdamW2(nets.make_net().parameters()),
    )  # of another model
    train(net, 2, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    found["ignored"] = said.lines[:]
    del ignored
    said.lines.clear()
    net = nets.make_net()
    AdamW2(net.parameters(), **nets.OPTIONS)  # made anew by who has the same options
    train(net, 1, {})
    found["made anew"] = said.lines[:]
    del same
    print("names " + json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
