"""What ranks share: DeepSpeed on NCCL (`zero`), and two ranks on the one GPU (`two`)."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu.part import ROOT, Failed, NotRun, Task, difference, result, short
from tests import net as nets
from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.engines.torch import plugin
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard

#: How far DeepSpeed's masters may be from the same training without it, ‖difference‖ over
#: ‖weights‖. float32: roundings of gradients that are summed in another order, divided by their own
#: size by Adam. bfloat16: it sums micro-batches in bfloat16 at some stages, 2⁻⁹ of a gradient off,
#: and of gradients that nearly cancel the sign hangs on that; four times what a CPU gives.
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

#: Of two ranks beside one process: the same sums in another order, carried on for some steps.
_APART = 1e-5


def zero(task: Task) -> None:
    """DeepSpeed's stages, one rank, beside the same training without it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise NotRun("no deepspeed")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": task.device}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    import deepspeed

    plugin.register()  # where the package is not installed, torch has not called it
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    tolerances.make_every_iteration()  # so that no rounding decides on one
    deepspeed.init_distributed(dist_backend="nccl" if task.is_gpu else "gloo", verbose=False)
    dtypes = torch.float32, torch.bfloat16
    cases = [(stage, dtype) for stage in (1, 2, 3, 0) for dtype in dtypes]
    expected = {dtype: _without_engine(task, dtype) for dtype in dtypes}
    bad = 0
    for stage, dtype in cases[::5] if task.tiny else cases:
        try:
            apart, more = _under_deepspeed(task, stage, dtype, expected[dtype])
        except Exception as error:  # one stage's failure is not the others'
            traceback.print_exc()
            bad += 1
            result("zero", stage=stage, dtype=dtype, error=f"{type(error).__name__}: {error}"[:500])
            continue
        passed = apart <= _LIMITS[dtype]
        bad += not passed
        result("zero", stage=stage, dtype=dtype, passed=passed, difference=short(apart), **more)
    dist.destroy_process_group()
    if bad:
        raise Failed(f"{bad} of DeepSpeed's cases failed")


def _under_deepspeed(
    task: Task, stage: int, dtype: torch.dtype, expected: dict[str, Tensor]
) -> tuple[float, dict[str, Any]]:
    """Return how far from the expected weights it ends, and what else there is to say."""
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": nets.MICRO,
        "gradient_accumulation_steps": nets.ACCUMULATION,
        "optimizer": {"type": "AdamW2", "params": dict(nets.OPTIONS)},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    net = nets.make_net(mixed=True)
    groups = nets.parameter_groups(net)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=groups, config=config)
    taken = []
    for global_batch in nets.batches(1):
        for micro in global_batch[:, 0].to(task.device):
            engine.backward(engine(micro))
            task.synchronize()
            start = time.perf_counter()
            engine.step()
            task.synchronize()
        taken.append(time.perf_counter() - start)  # of the last, which steps
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        apart = max(
            _apart(parameter.detach().float(), expected[name].to(dtype).float())
            for name, parameter in net.named_parameters()
        )
    wrapper = type(engine.optimizer).__name__
    return apart, {"wrapper": wrapper, "step_ms": round(statistics.median(taken) * 1e3, 3)}


def _apart(tensor: Tensor, expected: Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm())


def _without_engine(task: Task, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the float32 masters after tests/net.py's training, on this device."""
    net = nets.make_net(mixed=True).to(task.device, dtype)
    masters = {
        name: nn.Parameter(parameter.detach().float().clone())
        for name, parameter in net.named_parameters()
    }
    decayed = [each for each in masters.items() if not each[0].endswith(nets.NO_DECAY)]
    others = [each for each in masters.items() if each[0].endswith(nets.NO_DECAY)]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW2(groups, **nets.OPTIONS)
    for global_batch in nets.batches(1):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in global_batch[:, 0].to(task.device):
            net.zero_grad()
            net(micro).backward()
            for name, parameter in net.named_parameters():
                masters[name].grad += parameter.grad.float() / nets.ACCUMULATION
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(masters[name])
    return {name: master.detach() for name, master in masters.items()}


def two(task: Task) -> None:
    """Two processes on the one device, over gloo: NCCL refuses two ranks on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GPU_RANKS": f"file://{folder}/store"}
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", "rank", *task.options()]
        ranks = [
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, **given, "RANK": str(number)})
            for number in range(2)
        ]
        statuses = [rank.wait() for rank in ranks]
    if any(statuses):
        raise Failed(f"the two ranks ended with {statuses}")


def rank(task: Task) -> None:
    """One of them: holds a part of a flat buffer that is cut within a row, and steps the whole of
    it alone, too.
    """
    number = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=os.environ["GPU_RANKS"],
        rank=number,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    tolerances.make_every_iteration()  # so that no rounding decides on one
    shapes = [(37, 22), (35, 22), (22, 35)]
    if not task.tiny:
        shapes = [(1111, 777), (512, 1031), (2049, 333)]
    bad = 0
    for rate in (1e-2, 7e-5, 1e-7):
        bad += not _shared(task, number, shapes, rate)
    dist.destroy_process_group()
    if bad:
        raise Failed(f"rank {number} differs from one process at {bad} of 3 rates")


def _shared(task: Task, number: int, shapes: list[tuple[int, int]], rate: float) -> bool:
    """Whether both ranks end where one process does, and say the same."""
    sizes = [prod(shape) for shape in shapes]
    total = sum(sizes)
    cut = total // 2 + 11
    first, last = ((0, cut), (cut, total))[number]
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(total, generator=generator) * 0.02
    piece = nn.Parameter(start[first:last].to(task.device))
    shards, at = [], 0
    for count, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        begin = min(max(first - at, 0), size)
        end = max(min(last - at, size), begin)
        offset = at + begin - first if begin < end else 0
        shards.append(Shard(Parameter(f"w{count}", shape), begin, end, offset))
        at += size
    spread = AdamW2([("line", piece)], lr=rate)
    world = dist.group.WORLD
    assert world is not None
    spread.engine = GivenLayout(lambda: Layout([Buffer(piece, tuple(shards), (world,))]))
    whole = [
        nn.Parameter(part.view(shape).clone().to(task.device))
        for part, shape in zip(start.split(sizes), shapes, strict=True)
    ]
    alone = AdamW2([(f"w{count}", parameter) for count, parameter in enumerate(whole)], lr=rate)
    taken = []
    for _ in range(3 if task.tiny else 8):
        grad = torch.randn(total, generator=generator) * 1e-3
        piece.grad = grad[first:last].to(task.device)
        for parameter, part in zip(whole, grad.split(sizes), strict=True):
            parameter.grad = part.view(parameter.shape).to(task.device)
        task.synchronize()
        begun = time.perf_counter()
        spread.step()
        task.synchronize()
        taken.append(time.perf_counter() - begun)
        alone.step()
    apart = difference(piece, torch.cat([each.detach().flatten() for each in whole])[first:last])
    said: list[Any] = [None, None]
    dist.all_gather_object(said, {name: tuple(each) for name, each in spread.stats().items()})
    both: list[Any] = [None, None]
    dist.all_gather_object(both, apart)
    passed = max(both) <= _APART and said[0] == said[1]
    if number == 0:
        entries = list(spread.stats().values())
        result(
            "two ranks",
            rate=rate,
            passed=passed,
            difference=short(max(both)),
            same_on_both=json.dumps(said[0]) == json.dumps(said[1]),
            clipped=sum(each.clipped for each in entries),
            certified=sum(each.certified for each in entries),
            matrices=len(entries),
            step_ms=round(statistics.median(taken) * 1e3, 3),
        )
    return passed
