"""Bounds of a whole step, and of what stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

from benchmarks.models import MODELS, is_of_a_block

from .bounds import Launch, Time, time_of
from .gpus import GPUS, LOWER, UPPER, Assumed, Gpu
from .step import COPIES, PASSES, STEP, Active, Step

#: What is counted, by the names of docs/step_time.md where it has one. τ is 0.01, at which W makes
#: one iteration, and U one or two.
STATES = {
    "inactive": Active(early=True, launched=False),
    "inactive, the host is not sure": Active(early=True, launched=True),
    "undecided": Active(early=False, launched=True, of_weight=1, of_update=1),
    "clipped": Active(early=False, launched=True, of_weight=1, of_update=1),
    "clipped, all iterated twice": Active(early=False, launched=True, of_weight=1, of_update=2),
}

#: With more vectors singular values are clipped, and U makes both its iterations.
PROJECTED = "projected"
PROJECT_STATES = {
    "inactive": STATES["inactive"],
    "inactive, the host is not sure": STATES["inactive, the host is not sure"],
    "undecided": STATES["clipped, all iterated twice"],
    PROJECTED: STATES["clipped, all iterated twice"]._replace(projected=True),
}

#: What AdamW² may take of fused AdamW's time.
GOALS = {"inactive": 1.10, "undecided": 2.0, "clipped": 2.0, PROJECTED: 2.5}

#: Fused AdamW: tensors and chunks of a launch, elements of a chunk (torch's MultiTensorApply.cuh),
#: and tensors of the launch that counts steps.
_TENSORS, _CHUNKS, _CHUNK, _COUNTED = 36, 320, 1 << 16, 110

#: Muon: Newton-Schulz steps; what it reads and writes of an element of float32, G, momentum and W;
#: what matrix products reach of the tensor cores' peak, assumed.
_NS_STEPS, _MUON_BYTES, _REACHED = 5, 20, (0.8, 0.4)


class Bounds(NamedTuple):
    """Milliseconds of a step."""

    lower: float
    upper: float
    launches: list[tuple[str, Time, Time]]  #: each, at its lower and at its upper bound


@cache
def bounds(model: str, gpu: str, width: int = 4) -> dict[str, Bounds]:
    """Return the bounds of a step in every state.

    Args:
        model: "gpt2-124m", "gpt-774m" or "vit-g-1011m", as benchmarks.models has them.
        gpu: "a100", "h100" or "h200".
        width: vectors of U: 4, where the rate is clipped, or 8 or 16, where singular values are.

    Raises:
        ValueError: there is no such model or GPU.
    """
    for name, got, known in (("model", model, MODELS), ("gpu", gpu, GPUS)):
        if got not in known:
            raise ValueError(f"cost_model: {name} got {got!r}, it takes {', '.join(known)}.")
    step = Step(model, GPUS[gpu], width)
    states = STATES if width == 4 else PROJECT_STATES
    return {state: _sum(step.launches(active), GPUS[gpu]) for state, active in states.items()}


def estimate(model: str, gpu: str, width: int = 4) -> dict[str, tuple[float, float]]:
    """Return the lower and the upper bound of every state, in milliseconds; see :func:`bounds`."""
    return {state: (each.lower, each.upper) for state, each in bounds(model, gpu, width).items()}


def _sum(launches: Sequence[Launch], gpu: Gpu) -> Bounds:
    times = [
        (launch.name, time_of(launch, gpu, LOWER), time_of(launch, gpu, UPPER))
        for launch in launches
    ]
    gaps = len(launches) + COPIES
    lower = sum(low.seconds for _, low, _ in times) + gaps * LOWER.gap
    upper = sum(high.seconds for _, _, high in times) + gaps * UPPER.gap
    return Bounds(lower * 1e3, upper * 1e3, times)


def adamw(model: str, gpu: str, assumed: Assumed = LOWER) -> float:
    """Return the milliseconds of fused AdamW: our own pass over all parameters, which moves as many
    bytes, and the gaps between its launches.
    """
    sizes = [prod(shape) for _, shape in MODELS[model].parameters()]
    chunks = sum(-(-size // _CHUNK) for size in sizes)
    launches = max(-(-len(sizes) // _TENSORS), -(-chunks // _CHUNKS))
    launches += -(-len(sizes) // _COUNTED)
    moved = time_of(Step(model, GPUS[gpu], 4).adamw(), GPUS[gpu], assumed).seconds
    return (moved + launches * assumed.gap) * 1e3


def muon(model: str, gpu: str) -> tuple[float, float]:
    """Return the bounds of Muon's step: Newton and Schulz on the hidden matrices in bf16, AdamW on
    the rest. Without gaps.
    """
    named = MODELS[model].parameters()
    hidden = [shape for name, shape in named if len(shape) == 2 and is_of_a_block(name)]
    rest = sum(prod(shape) for _, shape in named) - sum(map(prod, hidden))
    operations = 0.0
    for shape in hidden:
        m, n = sorted(shape)
        # X Xᵀ, its square, and the polynomial times X
        operations += _NS_STEPS * (4 * m * m * n + 2 * m**3)
    moved = PASSES[STEP] * rest + _MUON_BYTES * sum(map(prod, hidden))
    of_gpu = GPUS[gpu]
    lower, upper = (
        operations / (of_gpu.tensor * reached) + moved / (of_gpu.dram * assumed.dram)
        for reached, assumed in zip(_REACHED, (LOWER, UPPER), strict=True)
    )
    return lower * 1e3, upper * 1e3
