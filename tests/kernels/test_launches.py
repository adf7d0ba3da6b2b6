"""What a step launches on a GPU, and what it costs the host: by the tables, not by the depth of the
model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("triton")

from benchmarks.models import MODELS
from tests.kernels import launches
from tests.kernels.launches import Step, counted, idle, settles, stands_in, stepping, total
from tests.processes import run_ranks
from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels.triton_step import numbers
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard

#: Launches a step, of Triton's kernels and of torch's; a collective is none.
MOST, MOST_OF_TORCH = 20, 40

#: What a step that the certificate is sure of has no need of.
OF_ITERATIONS = {"products", "collect", "orthonormalize", "decide_rates"}

GPT2 = MODELS["gpt2-124m"]


def check_iterated(steps: list[Step]) -> None:
    for step in steps:
        assert step == steps[0], "it hangs on the depth"
        assert total(step) <= MOST and step.torch <= MOST_OF_TORCH, step
        assert step.triton.keys() >= OF_ITERATIONS


def check_sure(steps: list[Step]) -> None:
    for step in steps:
        assert step == steps[0], "it hangs on the depth"
        assert not step.triton.keys() & OF_ITERATIONS, step
        # Of the three passes one steps; none takes back, and none moves what waited.
        assert step.triton["elementwise"] == 1 and total(step) <= 5
        # About 40 of them are the horizon's, on vectors of the host, and launch nothing.
        assert step.torch <= 2 * MOST_OF_TORCH


def test_an_iterated_step_has_few_launches_at_any_depth() -> None:
    steps = [counted(stepping(GPT2._replace(blocks=depth))[0], idle) for depth in (12, 48)]
    print(f"\n{total(steps[0])} of Triton, {steps[0].torch} of torch: {steps[0].triton}")
    check_iterated(steps)
    assert steps[0].collectives == 0


def test_a_step_that_is_sure_to_be_settled_launches_no_iteration() -> None:
    steps = [counted(stepping(GPT2._replace(blocks=depth))[0], settles) for depth in (12, 48)]
    print(f"\n{total(steps[0])} of Triton, {steps[0].torch} of torch: {steps[0].triton}")
    check_sure(steps)


def test_a_matrix_that_is_not_sure_any_more_is_iterated_again() -> None:
    """In the step itself: the rate that it is made at decides, too."""
    optimizer, _ = stepping(GPT2._replace(blocks=1))
    with stands_in(settles) as launched:
        for _ in range(6):
            optimizer.step()
        launched.clear()
        optimizer.step()
        assert not launched.keys() & OF_ITERATIONS
        optimizer.param_groups[0]["lr"] = 1e9
        launched.clear()
        optimizer.step()
        assert launched.keys() >= OF_ITERATIONS


def test_weights_that_others_wrote_are_looked_at_again() -> None:
    optimizer, params = stepping(GPT2._replace(blocks=1))
    with stands_in(settles) as launched:
        for _ in range(6):
            optimizer.step()
        with torch.no_grad():
            params[0].mul_(0.5)
        launched.clear()
        optimizer.step()
        assert launched.keys() >= OF_ITERATIONS


def test_ranks_launch_as_few_and_sum_a_fixed_number_of_times() -> None:
    """Two of them, between which every matrix is cut within a row."""
    printed = run_ranks("torch", Path(__file__).with_name("launches_worker.py"), 2)
    (line,) = (line for line in printed.splitlines() if line.startswith("counts:"))
    steps = {name: Step(**step) for name, step in json.loads(line[7:]).items()}
    iterated = [steps[f"iterated {depth}"] for depth in (12, 48)]
    sure = [steps[f"sure {depth}"] for depth in (12, 48)]
    print(
        f"\n{total(iterated[0])} of Triton, {iterated[0].torch} of torch, sums: "
        f"{iterated[0].collectives}; sure {total(sure[0])}, {sure[0].torch}, "
        f"{sure[0].collectives}"
    )
    check_iterated(iterated)
    check_sure(sure)
    rounds = iterated[0].triton["products"]
    assert iterated[0].collectives == 1 + 2 * rounds and sure[0].collectives == 1


def test_what_a_rank_has_alone_decides_nothing_of_what_it_shares() -> None:
    """Or it would not take part in sums that ranks without it wait for."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        sums = [counted(_sharing(more), _settles_all_but_the_first) for more in (0, 1)]
    finally:
        dist.destroy_process_group()
    assert sums[0].collectives == sums[1].collectives > 1


def _sharing(alone: int) -> AdamW2:
    """Return an optimizer of half of a matrix and of so many whole ones."""
    everyone = dist.group.WORLD
    assert everyone is not None
    shared, *whole = (Parameter(f"w{number}", (8, 6)) for number in range(1 + alone))
    tensors = [nn.Parameter(torch.ones(size)) for size in (27, *[48] * alone)]
    buffers = [Buffer(tensors[0], (Shard(shared, 0, 27, 0),), (everyone,))]
    for tensor, parameter in zip(tensors[1:], whole, strict=True):
        buffers.append(Buffer(tensor, (Shard(parameter, 0, 48, 0),)))
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = AdamW2(tensors, lr=1e-3)
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    return optimizer


def _settles_all_but_the_first(name: str, given: tuple[Any, ...]) -> None:
    settles(name, given)
    if name == "follow":
        given[2][numbers.AGE.value, 0] = 0.0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("stand", [idle, settles])
def test_the_host_s_time(stand: launches.Stand) -> None:
    """The least of many steps, in the thread's own time, so that other processes do not count.

    What they do to caches counts: five turns, each beside what the machine is like just then.
    """
    optimizer, params = stepping(GPT2)
    assert len(params) == 148
    turns = []
    while not turns or (min(turns) > 2 and len(turns) < 5):
        with stands_in(stand):
            least = _least(optimizer, params, 300)
        turns.append(least / max(1.0, _slowness()))
    optimizer, params = stepping(GPT2)
    with launches.triton_s_own_launcher():
        with_launcher = _least(optimizer, params, 100)
    print(
        f"\n{len(params)} parameters: {least:.2f} ms a step, {min(turns):.2f} on an idle machine; "
        f"with Triton's launcher in an iterated one {with_launcher:.2f} ms"
    )
    assert min(turns) <= 2, turns


#: Milliseconds that :func:`_slowness` takes on 2 idle cores (Intel Xeon, 2026-11-29).
_IDLE = 0.41


def _slowness() -> float:
    """Return how much longer Python takes here and now than on an idle machine: other tests run
    beside this one.
    """
    times = []
    for _ in range(50):
        start = time.thread_time()
        pairs = [(number, str(number)) for number in range(3000)]
        dict(pairs)
        times.append(1e3 * (time.thread_time() - start))
    return min(times) / _IDLE


def _least(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], count: int) -> float:
    times = []
    for _ in range(count):
        launches.set_gradients(params)
        start = time.thread_time()
        optimizer.step()
        times.append(1e3 * (time.thread_time() - start))
    return min(times)
