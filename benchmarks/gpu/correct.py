"""Whole runs of AdamW² under Triton's kernels beside plain torch (`kernels`), and beyond 2³¹
elements (`big`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu.part import Failed, Task, difference, result, short
from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels.choice import VARIABLE
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard

#: Of steps in a run: clipped from cold vectors, settled, and settled until it is taken back.
_RATES = (1e-2, 1e-2, 1e-7, 1e-7, 1e-7, 1e-2)

#: How far two runs may be apart: the largest difference over the largest weight, as
#: tests/kernels/test_cuda.py has it; roundings that a dozen steps go on with.
_LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}

#: Of weights in bfloat16: ‖difference‖ / ‖weights‖ over √steps. Plain torch is 0.3 % from the same
#: in float32 after these six steps, and 1.0 % where the last is left out; the limit is 0.96 %.
_BF16_LIMIT = 2**-8

#: Of weights in float32 with M and V in bfloat16, in norm: a last bit of float32 flips a rounding
#: of one number in some ten thousand, which moves its weight by 2⁻⁸ of a step.
_NARROW_LIMIT = 1e-4


class Case(NamedTuple):
    """Matrices in a row, cut into pieces as ranks hold them."""

    shapes: tuple[tuple[int, ...], ...]
    cuts: tuple[float, ...] = ()  # as shares of all elements
    gap: int = 0  # elements before each piece, which nobody steps
    weight: torch.dtype = torch.float32
    grad: torch.dtype = torch.float32
    vectors: int = 0  # whose singular values are clipped; 0: the rate is
    state: str | None = None  # of M and V; None: as the weight


_TINY = Case(((7, 9), (4,)), (0.5,), 1)

_CASES = (
    Case(((1, 1), (1, 70), (70, 1), (5,))),
    Case(((33, 257), (5, 9), (257,)), (0.37,), 1),
    Case(((64, 70), (3, 3)), (0.2, 0.5, 0.9), 3),
    Case(((513, 129), (1000, 777), (777,)), (0.37, 0.61), 1),
    Case(((16, 128), (2048, 1031)), (0.5,), 2),
    Case(((7, 5000), (1537, 3072)), (0.123, 0.7), 5),
    Case(((768, 768),) * 5),
    Case(((768, 768), (3072, 768), (768, 3072)), (0.31,)),
    Case(((3000, 2), (2, 3000), (50257, 24)), (0.3,), 1),
)

#: Rule 1 by projection.
_PROJECTED = tuple(
    Case(shapes, cuts, gap, vectors=vectors)
    for shapes, cuts, gap in (
        (((33, 257), (5, 9), (257,)), (0.37,), 1),
        (((768, 768), (3072, 768), (768, 3072)), (0.31,), 0),
    )
    for vectors in (4, 8, 16)
)

#: What else people train in: what Triton does not take is stepped in plain torch.
_DTYPES = tuple(
    Case(((33, 257), (96, 64), (257,)), (0.37,), 1, weight, grad)
    for weight, grad in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    )
)
#: M and V in bfloat16 beside weights in float32.
_NARROW = tuple(
    Case(((33, 257), (768, 3072), (257,)), (0.37,), 1, vectors=vectors, state="bfloat16")
    for vectors in (0, 8)
)


def kernels(task: Task) -> None:
    """Each case under Triton, twice, and in plain torch; what Triton does not take as a user gets
    it, beside plain torch on the CPU.
    """
    bad = 0
    cases = (*_CASES, *_PROJECTED, *_DTYPES, *_NARROW)
    if task.tiny:  # the interpreter is slow, and cuts float32 off where bfloat16 is rounded
        double = _TINY._replace(weight=torch.float64, grad=torch.float64)
        cases = (_TINY, _TINY._replace(vectors=4), double)
    with tolerances.every_iteration():  # so that no rounding decides on one
        for case in cases:
            begin = time.perf_counter()
            passed, said = _compare(task, case)
            bad += not passed
            seconds = round(time.perf_counter() - begin, 2)
            result("case", **case._asdict(), passed=passed, **said, seconds=seconds)
    if bad:
        raise Failed(f"{bad} of {len(cases)} cases differ from plain torch, or are refused")


def _compare(task: Task, case: Case) -> tuple[bool, dict[str, Any]]:
    """Return whether a case is as it should be, and what there is to say of it."""
    rates = _RATES[1:3] if task.tiny else _RATES  # the interpreter is slow
    if case.vectors and not task.tiny:
        # After more settled steps a GPU makes fewer iterations, and what is clipped hangs on them.
        rates = (*_RATES[:3], _RATES[0])
    try:
        kernel, refused = "triton", ""
        weights = _trained(case, task.device, kernel, rates)
        expected = _trained(case, task.device, "torch", rates)
    except ValueError as error:  # it says what it takes
        kernel, refused = "", str(error)
        if case.weight == case.grad == torch.float32:
            return False, {"refused": refused}
        try:
            weights = _trained(case, task.device, kernel, rates)
            expected = _trained(case, "cpu", "torch", rates)
        except ValueError as error:  # no kernel does
            return True, {"refused": str(error)}
    repeats = None
    if task.is_gpu:
        repeats = all(map(torch.equal, weights, _trained(case, task.device, kernel, rates)))
    if case.state:
        apart, limit = max(map(_norm_apart, weights, expected)), _NARROW_LIMIT
    elif case.weight in _LIMITS:
        apart, limit = max(map(difference, weights, expected)), _LIMITS[case.weight]
    else:
        apart = max(map(_norm_apart, weights, expected))
        limit = _BF16_LIMIT * len(rates) ** 0.5
    said = {"difference": short(apart), "limit": short(limit), "repeats": repeats}
    if refused:
        said["refused by triton"] = refused
    return apart <= limit and repeats is not False, said


def _norm_apart(tensor: Tensor, expected: Tensor) -> float:
    tensor, expected = tensor.double().cpu(), expected.double().cpu()
    return float((tensor - expected).norm() / expected.norm())


def _trained(case: Case, device: str, kernel: str, rates: Sequence[float]) -> list[Tensor]:
    """Return the pieces, with what lies before them, after a step at each rate under a kernel ("":
    the optimizer's choice).

    Raises:
        ValueError: the kernel, or torch, does not take the case's dtypes.
    """
    generator = torch.Generator().manual_seed(0)
    total = sum(map(prod, case.shapes))
    pieces = _pieces(case)
    whole = torch.randn(total, generator=generator, dtype=torch.float64) * 0.02
    tensors, views, buffers = [], [], []
    for number, (first, last) in enumerate(pieces):
        tensor = torch.zeros(case.gap + last - first, dtype=case.weight)
        tensor[case.gap :] = whole[first:last].to(case.weight)
        tensors.append(tensor.to(device))
        views.append(nn.Parameter(tensors[-1][case.gap :]))
        shards = tuple(_shards(case.shapes, first, last, f"rank{number}"))
        buffers.append(Buffer(views[-1], shards))
    clip: dict[str, Any] = {"clip": "project", "vectors": case.vectors, "io": []}
    # V in bfloat16 stands still at the default β₂.
    kept: dict[str, Any] = {"state_dtype": case.state, "betas": (0.9, 0.95)}
    optimizer = AdamW2(
        views,
        lr=rates[0],
        weight_decay=0.1,
        **(clip if case.vectors else {}),
        **(kept if case.state else {}),
    )
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    with _kernel(kernel):
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            grad = torch.randn(total, generator=generator, dtype=torch.float64) * 1e-3
            for view, (first, last) in zip(views, pieces, strict=True):
                if case.grad != case.weight:
                    if not hasattr(view, "grad_dtype"):
                        raise ValueError(f"torch {torch.__version__} takes gradients of one dtype")
                    view.grad_dtype = case.grad
                view.grad = grad[first:last].to(case.grad).to(device)
            optimizer.step()
    return tensors


def _pieces(case: Case) -> list[tuple[int, int]]:
    """Return the ranges of elements that are held: each ends at a cut, within a row, and the next
    begins with the row after it.

    What is left of that row is nobody's: rows that begin in the middle take the rank that holds
    their beginning (`two` has it).
    """
    total = sum(map(prod, case.shapes))
    pieces, first = [], 0
    for cut in (int(share * total) for share in case.cuts):
        pieces.append((first, cut))
        at = 0
        for shape in case.shapes:
            if at <= cut < at + prod(shape):
                width = prod(shape[1:])
                first = at + -(-(cut - at) // width) * width
            at += prod(shape)
    return [*pieces, (first, total)]


def _shards(shapes: Sequence[tuple[int, ...]], first: int, last: int, rank: str) -> list[Shard]:
    """Return what of the shapes, which lie in a row, is in a range of elements.

    The names tell the ranks: no process group sums what they measure.
    """
    shards, at = [], 0
    for number, shape in enumerate(shapes):
        size = prod(shape)
        start, stop = max(first - at, 0), min(last - at, size)
        if start < stop:
            parameter = Parameter(f"{rank}.w{number}", shape)
            shards.append(Shard(parameter, start, stop, at + start - first))
        at += size
    return shards


@contextmanager
def _kernel(name: str) -> Iterator[None]:
    """Have optimizers that make their first step meanwhile take a kernel."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def big(task: Task) -> None:
    """Matrices beyond the first 2³¹ elements of a buffer are stepped as alone, and a matrix of more
    elements as AdamW steps it.
    """
    # Triton's interpreter is slow. Every iteration: so that no rounding decides on one.
    with _kernel("triton" if task.is_gpu else ""), tolerances.every_iteration():
        _beyond(task, 100 if task.tiny else 2**31 + 5)
        task.forget_peak()
        _giant(task, (9, 7) if task.tiny else (65600, 32768))


def _beyond(task: Task, far: int) -> None:
    shapes = ((5, 9), (6, 7)) if task.tiny else ((1000, 777), (513, 2049))
    starts = (3, far)
    line = torch.empty(far + prod(shapes[1]) + 7, device=task.device)
    grads = torch.empty_like(line)
    generator = torch.Generator(task.device).manual_seed(1)
    alone, shards = {}, []
    for number, (shape, start) in enumerate(zip(shapes, starts, strict=True)):
        name, there = f"w{number}", slice(start, start + prod(shape))
        line[there].normal_(0, 0.02, generator=generator)
        grads[there].normal_(0, 1e-3, generator=generator)
        alone[name] = nn.Parameter(line[there].clone().view(shape))
        alone[name].grad = grads[there].clone().view(shape)
        shards.append(Shard(Parameter(name, shape), 0, prod(shape), start))
    parameter = nn.Parameter(line)
    parameter.grad = grads
    wide, near = AdamW2([("line", parameter)], lr=1e-2), AdamW2(alone.items(), lr=1e-2)
    wide.engine = GivenLayout(lambda: Layout([Buffer(parameter, tuple(shards))]))
    for _ in range(2):
        wide.step()
        near.step()
    apart = max(
        difference(line[start : start + prod(shape)].view(shape), alone[f"w{number}"])
        for number, (shape, start) in enumerate(zip(shapes, starts, strict=True))
    )
    rates = {name: (entry.lr, near.stats()[name].lr) for name, entry in wide.stats().items()}
    result(
        "matrices beyond 2^31 elements",
        elements=len(line),
        difference=short(apart),
        rates=rates,
        peak_gib=task.peak(),
    )
    if not apart <= 1e-6:  # the same numbers, in tiles that begin elsewhere
        raise Failed(f"a matrix behind {far} elements moved otherwise than alone: {apart:.1e}")


def _giant(task: Task, shape: tuple[int, int]) -> None:
    generator = torch.Generator(task.device).manual_seed(1)
    weight = nn.Parameter(
        torch.empty(shape, device=task.device).normal_(0, 0.02, generator=generator)
    )
    weight.grad = torch.empty(shape, device=task.device).normal_(0, 1e-3, generator=generator)
    rows = [0, shape[0] // 2, shape[0] - 1]
    before = weight[rows].detach().clone()
    optimizer = AdamW2([("w", weight)], lr=1e-2)
    start = time.perf_counter()
    optimizer.step()
    entry = optimizer.stats()["w"]
    seconds = time.perf_counter() - start
    grads = weight.grad[rows]
    # AdamW's first step: U = G / (|G| + ε); the weight decay is 0.01.
    expected = before * (1 - entry.lr * 0.01) - entry.lr * grads / (grads.abs() + 1e-8)
    apart = difference(weight[rows], expected)
    about = 0.02 * (shape[0] ** 0.5 + shape[1] ** 0.5)  # σ₁ of such a matrix, if it is large
    result(
        "a matrix of more than 2^31 elements",
        shape=shape,
        difference=short(apart),
        sigma_weight=entry.sigma_weight,
        sigma_of_random=about,
        rate=entry.lr,
        seconds=round(seconds, 2),
        peak_gib=task.peak(),
    )
    if not apart <= 1e-5:  # a division of roundings
        raise Failed(f"rows of a matrix of shape {shape} are {apart:.1e} from AdamW's step")
    # Of half of its rows it would be 17 % less.
    if not task.tiny and not 0.85 * about < entry.sigma_weight < 1.02 * about:
        raise Failed(f"σ₁ is {entry.sigma_weight:.3f}, of such a matrix it is about {about:.3f}")
