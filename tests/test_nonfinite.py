from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import run_ranks
from weyl_megatron import AdamW2
from weyl_megatron.layouts.buffers import Buffer, Parameter, Shard
from weyl_megatron.nonfinite import Guard, is_finite

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
    state = [
        entry for parameter in net.parameters() for entry in optimizer.state[parameter].values()
    ]
    return [*net.parameters(), *state]


@pytest.mark.parametrize("value", BAD)
def test_a_step_on_what_is_not_finite_is_as_if_it_had_not_been(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert (
        len(caplog.messages) == 2 and "the gradient of 1.weight is not finite" in caplog.messages[0]
    )


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


def test_after_so_many_in_a_row_it_is_an_error(
    record_property: Callable[[str, object], None],
) -> None:
    record_property("tried", "three steps in a row with NaN, nonfinite_limit 3")
    net, optimizer = make(nonfinite="skip", nonfinite_limit=3)
    for step, is_bad in enumerate([True, True, False, True, True, True]):
        set_gradients(net, step)
        if is_bad:
            poison(net[0].weight, float("nan"))
        if step == 5:
            with pytest.raises(
                RuntimeError, match="nonfinite_limit is 3, and as many steps in a row were skipped"
            ):
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


class Reads(TorchDispatchMode):
    """Counts how often the host reads a tensor, for which it would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def buffer(name: str, grad: torch.Tensor | None, *groups: dist.ProcessGroup) -> Buffer:
    tensor = nn.Parameter(torch.zeros(3) if grad is None else torch.zeros_like(grad))
    tensor.grad = grad
    parameter = Parameter(name, tuple(tensor.shape))
    return Buffer(tensor, (Shard(parameter, 0, tensor.numel(), 0),), groups)


def various() -> list[torch.Tensor]:
    """Gradients of any dtype and layout, the largest numbers of each among them."""
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    grads = [torch.randn(n, 5).to(dtype) for dtype in dtypes for n in (1, 8, 300)]
    for grad in grads:
        grad.view(-1)[1] = torch.finfo(grad.dtype).max
    return [*grads, torch.randn(6, 7).T[::2], torch.tensor(2.0), torch.empty(0, 4)]


def test_the_host_reads_once_a_step_however_many_gradients_there_are() -> None:
    """A GPU idles at each: with two for every parameter, 296 times a step of GPT-2 124M."""
    grads = various()
    buffers = [buffer(f"w{number}", grad) for number, grad in enumerate([*grads, None])]
    guard = Guard("skip", None)
    with Reads() as reads:
        assert guard.admits(buffers)
    assert reads.count == 1
    grads[4].view(-1)[2] = float("nan")
    grads[7].view(-1)[2] = float("-inf")
    with pytest.raises(FloatingPointError, match="the gradient of w4, w7 is not finite"):
        Guard("raise", None).admits(buffers)
    assert not guard.admits(buffers) and guard.skipped == 1


def test_ranks_that_share_a_matrix_agree_in_that_one_read(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        buffers = [buffer(f"w{n}", torch.randn(4, 3), dist.group.WORLD) for n in range(5)]
        guard = Guard("skip", None)
        with Reads() as reads:
            assert guard.admits(buffers)
        assert reads.count == 1
        poison(buffers[3].tensor, float("inf"))  # type: ignore[arg-type]
        assert not guard.admits(buffers)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("value", BAD)
def test_one_element_is_enough(value: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":  # as it is asked there, of tensors on the CPU
        norms = partial(torch._foreach_norm, ord=torch.inf)
        monkeypatch.setattr("weyl_megatron.nonfinite._bounds", lambda alike: list(norms(alike)))
    assert is_finite() and is_finite(torch.empty(0)) and is_finite(*various())
    shapes = [grad.shape for grad in various() if grad.numel()]
    for number, shape in enumerate(shapes):
        for place in {0, shape.numel() // 2, shape.numel() - 1}:
            grads = various()
            grads[number][torch.unravel_index(torch.tensor(place), shape)] = value
            assert not is_finite(*grads)


def test_one_rank_s_nan_skips_the_step_on_all_under_deepspeed(
    record_property: Callable[[str, object], None],
) -> None:
    record_property(
        "tried", "NaN and Inf in one gradient on one of 2 ranks: ZeRO-0 to 3, fp32, bf16, offload"
    )
    said = run_ranks(
        "deepspeed", Path(__file__).parent / "engines/deepspeed/nonfinite_worker.py", 2
    )
    lines = said.splitlines()
    results = [line for line in lines if "step" in line and line.startswith("zero")]
    assert len(results) == 18 and all(
        line.endswith(": as without that step") for line in results
    ), said
    expected = {"zero1": 0, "zero2": 0, "zero3": 2}
    assert {
        f"{stage} without a check: as AdamW, {count} skipped" for stage, count in expected.items()
    } <= set(lines)
    named = [
        line
        for line in lines
        if "is skipped, number 1 in a row: the gradient of blocks.0.attn.q.weight is" in line
    ]
    assert len(named) >= 2 * (len(results) - 2), (
        said
    )  # offloaded gradients are gone before they can be named
    record_property(
        "survived",
        "the step is skipped on both, named and counted; all else as without it, bit for bit",
    )
