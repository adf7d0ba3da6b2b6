from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import torchrun
from weyl_megatron import AdamW2

BAD = (float("nan"), float("inf"), float("-inf"))


def make(**options: object) -> tuple[nn.Sequential, AdamW2]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    return net, AdamW2(net.named_parameters(), lr=0.1, **options)  # type: ignore[arg-type]


def set_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def poison(parameter: nn.Parameter, value: float) -> None:
    assert parameter.grad is not None
    parameter.grad.view(-1)[1] = value


def everything(net: nn.Module, optimizer: AdamW2) -> list[torch.Tensor]:
    state = [entry for parameter in net.parameters() for entry in optimizer.state[parameter].values()]
    return [*net.parameters(), *state]


@pytest.mark.parametrize("value", BAD)
def test_a_step_on_what_is_not_finite_is_as_if_it_had_not_been(value: float, caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for bad_steps in ((), (2, 5)):
        net, optimizer = make(nonfinite="skip")
        for step in range(6):
            if step in (2, 5) and step not in bad_steps:
                continue
            set_gradients(net, step)
            if step in bad_steps:
                poison(net[1].weight, value)
            with caplog.at_level(logging.WARNING, logger="weyl_megatron"):
                optimizer.step()
        assert optimizer.skipped_steps == len(bad_steps)
        runs.append(everything(net, optimizer))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert len(caplog.messages) == 2 and "the gradient of 1.weight is not finite" in caplog.messages[0]


def test_raise_stops_before_anything_changes() -> None:
    net, optimizer = make(nonfinite="raise")
    before = [parameter.clone() for parameter in net.parameters()]
    set_gradients(net, 0)
    poison(net[0].bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"AdamW2: the gradient of 0\.bias is not finite"):
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"nonfinite": "off"}])
def test_in_plain_pytorch_it_is_off_as_in_adamw(options: dict[str, str]) -> None:
    net, optimizer = make(**options)
    set_gradients(net, 0)
    poison(net[0].weight, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 0 and bool(net[0].weight.isnan().any())


def test_after_so_many_in_a_row_it_is_an_error(record_property: Callable[[str, object], None]) -> None:
    record_property("tried", "three steps in a row with NaN, nonfinite_limit 3")
    net, optimizer = make(nonfinite="skip", nonfinite_limit=3)
    for step, is_bad in enumerate([True, True, False, True, True, True]):
        set_gradients(net, step)
        if is_bad:
            poison(net[0].weight, float("nan"))
        if step == 5:
            with pytest.raises(RuntimeError, match="nonfinite_limit is 3, and as many steps in a row were skipped"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.skipped_steps == 5
    record_property("survived", "an error in one sentence, that names the parameter")


def test_large_numbers_are_finite() -> None:
    net, optimizer = make(nonfinite="raise")
    set_gradients(net, 0)
    poison(net[0].weight, 3e38)  # its square is not
    optimizer.step()


def test_one_rank_s_nan_skips_the_step_on_all_under_deepspeed(record_property: Callable[[str, object], None]) -> None:
    record_property("tried", "NaN and Inf in one gradient on one of 2 ranks: ZeRO-0 to 3, fp32, bf16, offload")
    said = torchrun(Path(__file__).parent / "integrations" / "nonfinite_worker.py", 2)
    lines = said.splitlines()
    results = [line for line in lines if "step" in line and line.startswith("zero")]
    assert len(results) == 18 and all(line.endswith(": as without that step") for line in results), said
    named = [
        line for line in lines if "is skipped, number 1 in a row: the gradient of blocks.0.attn.q.weight is" in line
    ]
    assert len(named) >= 2 * (len(results) - 2), said  # offloaded gradients are gone before they can be named
    record_property("survived", "the step is skipped on both, named and counted; all else as without it, bit for bit")
