"""How the optimizer and an engine find each other."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from weyl_megatron import AdamW2
from weyl_megatron.engines import engine as engines
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.engines.torch.plain import PlainTorch
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    engines._load()
    monkeypatch.setattr(engines, "_finders", [*engines._finders])
    monkeypatch.setattr(engines, "_preparations", [*engines._preparations])


def half(weight: nn.Parameter) -> Layout:
    """The layout of a tensor that is the first two rows of a matrix of four."""
    shard = Shard(Parameter("whole", (4, 3)), 0, weight.numel(), 0)
    return Layout([Buffer(weight, (shard,))])


def stepping(**options: Any) -> tuple[AdamW2, nn.Parameter]:
    weight = nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.ones(2, 3)
    return AdamW2([("w", weight)], **options), weight


def test_pytorch_holds_what_no_engine_does() -> None:
    optimizer, weight = stepping()
    known = engines.Known(optimizer.param_groups, dict, {}, None)
    assert isinstance(engines.find(known), PlainTorch)
    assert known.tensors() == [weight]


def test_an_engine_that_finds_its_parameters_is_asked_before_pytorch(registry: None) -> None:
    optimizer, weight = stepping()
    engines.register(
        find=lambda known: GivenLayout(lambda: half(weight)) if known.tensors() else None
    )
    optimizer.step()
    assert optimizer.stats().keys() == {"whole"}


def test_engines_make_ready_for_every_optimizer_that_is_made(registry: None) -> None:
    made: list[torch.optim.Optimizer] = []
    engines.register(prepare=made.append)
    optimizer, _ = stepping()
    assert made == [optimizer]


def test_an_engine_that_sets_itself_has_its_layout_read_at_the_next_step() -> None:
    optimizer, weight = stepping()
    optimizer.step()
    assert optimizer.stats().keys() == {"w"}
    optimizer.engine = GivenLayout(lambda: half(weight))
    optimizer.step()
    assert optimizer.stats().keys() == {"whole"}


def test_an_engine_may_count_in_the_groups() -> None:
    optimizer, weight = stepping()
    optimizer.engine = GivenLayout(lambda: half(weight), counts_in_groups=True)
    optimizer.param_groups[0]["step"] = 0
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 3 and "step" not in optimizer.state[weight]


def test_a_construction_call_makes_the_state_and_moves_nothing() -> None:
    class Constructing(GivenLayout):
        def is_constructing(self) -> bool:
            return True

    optimizer, weight = stepping()
    optimizer.engine = Constructing(lambda: half(weight))
    optimizer.step()
    assert torch.equal(weight, torch.ones(2, 3))
    assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_copy_has_no_engine() -> None:
    """What holds the parameters of the original does not hold those of a copy."""
    optimizer, weight = stepping()
    optimizer.engine = GivenLayout(lambda: half(weight))
    copied = AdamW2([torch.nn.Parameter(torch.ones(2, 3))])
    copied.__setstate__(optimizer.__getstate__())
    assert copied.engine is None


def test_a_deepspeed_engine_is_not_kept_alive() -> None:
    adapter = pytest.importorskip("weyl_megatron.engines.deepspeed.adapter")

    class DeepSpeedEngine:
        optimizer = None

    engine = DeepSpeedEngine()
    held, reference = adapter.DeepSpeed(engine), weakref.ref(engine)
    assert held.is_constructing()
    del engine
    gc.collect()
    assert reference() is None and not held.is_constructing()
    with pytest.raises(ValueError, match="after its DeepSpeedEngine was deleted"):
        held.read_layout(engines.Known([], dict, {}, None))
