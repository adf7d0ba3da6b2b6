"""torchrun worker: a script under WEYL_MEGATRON that asks megatron-core for what AdamW2 is not, and
prints what is said.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist

from tests import megatron_cpu

megatron_cpu.install()

import megatron.core.optimizer as factory  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402


class Lines(logging.Handler):
    """Keeps what is logged."""

    lines: list[str] = []  # noqa: RUF012 (of the one that there is)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    dist.init_process_group("gloo")
    gpt.start({})
    model = gpt.build({})

    def build(name: str, get: Callable[..., Any] = factory.get_megatron_optimizer) -> Any:
        config = OptimizerConfig(optimizer=name, lr=0.01, min_lr=0.0, clip_grad=0.0)
        return get(config, model)

    sentences = {"sgd": said(lambda: build("sgd"))}
    if find_spec("megatron.core.optimizer.muon") is not None:
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer

        sentences["muon"] = said(lambda: build("muon", get_megatron_muon_optimizer))
    adam, factory.Adam = factory.Adam, type("StatelessAdam", (factory.Adam,), {})
    sentences["another Adam"] = said(lambda: build("adam"))
    factory.Adam = adam
    changed = OptimizerConfig(optimizer="adam", lr=0.01)
    changed.decoupled_weight_decay = False
    sentences["option"] = said(lambda: factory.get_megatron_optimizer(changed, model))

    logging.getLogger("weyl_megatron").addHandler(handler := Lines())
    for warmup in (0, 10):
        OptimizerParamScheduler(
            build("adam"),
            init_lr=0.0,
            max_lr=0.01,
            min_lr=0.0,
            lr_warmup_steps=warmup,
            lr_decay_steps=100,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
    sentences["warmup"] = " / ".join(handler.lines)
    built = build("adam")
    act = sys.modules["weyl_megatron.engines.megatron.variable"].act
    sentences["late"] = said(lambda: act(factory))
    assert built is not None
    print(f"refusals {json.dumps(sentences)}", flush=True)
    gpt.stop()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
