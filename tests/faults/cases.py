"""Draws models, how ranks share them, options, and gradients that are meant to hurt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from weyl_megatron.layouts.buffers import Parameter
from weyl_megatron.layouts.fused import Fused, interleaved
from weyl_megatron.layouts.kinds import guessed_form
from weyl_megatron.layouts.tensor_parallel import Sharding, band_of


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model, and how tensor-parallel ranks share it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: str  # what its numbers are
    group: int  # parameter group
    dim: int | None  # that tensor parallelism cuts, at ``cuts``
    cuts: tuple[int, ...]  # of that dimension, one more than there are tensor-parallel ranks
    pieces: tuple[float, ...]  # where data parallelism cuts it, as shares of its elements
    pattern: tuple[int, ...] = ()  # rows that repeat in it

    @property
    def axis(self) -> int | None:
        """The axis along which it is several matrices."""
        if self.kind == "qkv":
            return 0 if self.shape[0] == 3 * self.shape[1] else 1
        if self.kind == "told":
            return 0 if self.shape[0] % 2 == 0 else 1
        return 0 if self.pattern else None

    @property
    def is_shared_evenly(self) -> bool:
        """Whether every rank has an equal share of each of its stacked parts."""
        if self.pattern or self.axis is None or self.dim != self.axis:
            return False
        ranks, parts = len(self.cuts) - 1, 3 if self.kind == "qkv" else 2
        extents = {stop - start for start, stop in pairwise(self.cuts)}
        return len(extents) == 1 and self.shape[self.axis] // parts % ranks == 0

    def matrices(self, whole: Tensor, clip_vectors: bool) -> list[tuple[str, Tensor]]:
        """Return the matrices in a tensor of the whole shape, by the name that they go by."""
        shape, name = self.shape, self.name
        if len(shape) < 2 or (len(shape) > 2 and sum(extent > 1 for extent in shape) < 2):
            found = [(name, whole.view(1, -1))] if clip_vectors and len(shape) == 1 else []
        elif self.kind == "stack":
            found = [(f"{name}[{e}]", expert) for e, expert in enumerate(whole)]
        elif self.pattern:
            parts = whole.view(shape[0] // sum(self.pattern), sum(self.pattern), shape[1]).split(
                self.pattern, 1
            )
            found = [
                (f"{name}[{n}]", part.reshape(part.shape[0] * part.shape[1], shape[1]))
                for n, part in enumerate(parts)
            ]
        elif (
            self.axis is not None and self.dim != self.axis
        ):  # else its parts are of several ranks: it is kept whole
            labels = "qkv" if self.kind == "qkv" else "01"
            parts = whole.chunk(len(labels), self.axis)
            found = [(f"{name}[{label}]", part) for label, part in zip(labels, parts, strict=True)]
        else:
            found = [(name, whole.flatten(1))]
        return [(each, matrix) for each, matrix in found if matrix.numel()]

    def parts(self, whole: Tensor, clip_vectors: bool) -> list[tuple[str, Tensor]]:
        """Return its matrices, or all that it holds as one vector."""
        return self.matrices(whole, clip_vectors) or [(self.name, whole.reshape(-1))]

    def band(self, whole: Tensor, tp: int) -> Tensor:
        if self.dim is None:
            return whole
        return whole.narrow(self.dim, self.cuts[tp], self.cuts[tp + 1] - self.cuts[tp])

    def parameter(self, group: Any, tp: int) -> Parameter:
        """Return it as tensor-parallel rank ``tp`` of a (stand-in) group has it; without a group
        whole.
        """
        fused: Fused | None = None
        labels = [str(part) for part in range(len(self.pattern))]
        if self.pattern:
            fused = interleaved(self.pattern, labels, self.shape[0])
        if group is None or self.dim is None:
            sharding = None if group is None else Sharding(group, None, (), tp)
            return band_of(self.name, self.shape, sharding, fused=fused)
        sizes = tuple(stop - start for start, stop in pairwise(self.cuts))
        shape = list(self.shape)
        shape[self.dim] = sizes[tp]
        return band_of(self.name, shape, Sharding(group, self.dim, sizes, tp), fused=fused)


@dataclass(frozen=True)
class Case:
    weights: tuple[Weight, ...]
    tp: int
    dp: int
    layout: str
    cuts: tuple[float, ...]  # of flat buffers, as shares
    gap: int  # elements of nobody between pieces
    gradients: tuple[str, ...]
    seed: int
    options: dict[str, Any]
    groups: tuple[dict[str, Any], ...]


KINDS = (
    "matrix",
    "matrix",
    "matrix",
    "vector",
    "scalar",
    "conv",
    "stack",
    "qkv",
    "told",
    "repeated",
)
STARTS = ("random", "random", "random", "zero", "1e-30", "1e30", "equal", "rank 1")
GRADIENTS = (
    "random",
    "random",
    "rank 1",
    "zero",
    "1e-30",
    "1e30",
    "again",
    "spike",
    "one element",
    "none",
)
EXTENT = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6, 7, 9, 12])
SHARE = st.sampled_from([0.0, 0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.77, 0.9, 1.0])


@st.composite
def weights(draw: st.DrawFn, number: int, tp: int, dp: int) -> Weight:
    kind = draw(st.sampled_from(KINDS))
    one, other = draw(EXTENT), draw(EXTENT)
    pattern: tuple[int, ...] = ()
    shape: tuple[int, ...] = (one, other)
    if kind == "vector":
        shape = (one,)
    elif kind == "scalar":
        shape = ()
    elif kind == "conv":
        shape = (one, min(other, 3), draw(st.integers(1, 2)), 2)
    elif kind == "stack":
        shape = (draw(st.integers(1, 3)), one, other)
    elif kind == "qkv":
        shape = draw(st.sampled_from([(3 * one, one), (one, 3 * one)]))
    elif kind == "told":
        shape = draw(st.sampled_from([(2 * one, other), (one | 1, 2 * other)]))
    elif kind == "repeated":
        pattern = draw(st.sampled_from([(1, 1), (2, 1, 1), (3, 2)]))
        shape = (sum(pattern) * min(one, 3), other)
    dims: list[int | None] = [None, *range(len(shape))]
    dim = draw(st.sampled_from(dims)) if tp > 1 and len(shape) in (1, 2) else None
    cuts = (0,)
    if dim is not None:
        inner = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=tp - 1, max_size=tp - 1)))
        cuts = (0, *inner, shape[dim])
    weight = Weight(
        {"qkv": f"h.{number}.c_attn.weight", "told": f"h.{number}.told"}.get(
            kind, f"h.{number}.{kind}"
        ),
        *(kind, shape, draw(st.sampled_from(STARTS)), draw(st.integers(0, 1)), dim, cuts),
        tuple(sorted(draw(st.lists(SHARE, min_size=dp - 1, max_size=dp - 1)))),
        pattern,
    )
    # Parts that ranks share out evenly are matrices of rows of all ranks, which one process has to
    # be told of: tests/engines/torch/test_mesh.py compares them.
    return replace(weight, dim=None, cuts=(0,)) if weight.is_shared_evenly else weight


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tp, dp = draw(
        st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 1), (3, 1), (5, 1), (2, 2)])
    )
    layout = draw(st.sampled_from(["flat", "pieces", "tensors"])) if dp > 1 else "plain"
    count = draw(st.integers(1, 4))
    drawn = tuple(draw(weights(number, tp, dp)) for number in range(count))
    tau = st.sampled_from([0.003, 0.02, 0.3, "auto", inf])
    options = {
        "clip_vectors": draw(st.booleans()),
        "floor_std": draw(st.sampled_from([1e-3, 1e-3, 0.0])),
        "power_iters": draw(st.sampled_from([2, 2, 1, 3])),
        "betas": draw(st.sampled_from([(0.9, 0.95), (0.9, 0.95), (0.0, 0.5)])),
        "io": ["h.0.*"],
    }
    groups = tuple(
        {"lr": draw(st.sampled_from([0.05, 1e-3, 1.0])), "weight_decay": decay, "tau": draw(tau)}
        for decay in (0.1, 0.0)
    )
    told: list[dict[str, Any]] = [
        {"match": weight.name, "fused": 2} for weight in drawn if weight.kind == "told"
    ]
    told += [  # no name tells, and of some shapes a convolution is more likely
        {"match": weight.name, "kind": "experts"}
        for weight in drawn
        if weight.kind == "stack" and guessed_form(weight.shape) != "experts"
    ]
    return Case(
        *(
            drawn,
            tp,
            dp,
            layout,
            tuple(sorted(draw(st.lists(SHARE, min_size=dp - 1, max_size=dp - 1)))),
        ),
        *(
            draw(st.integers(0, 2)),
            tuple(draw(st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=4))),
        ),
        *(draw(st.integers(0, 999)), {**options, "overrides": told}, groups),
    )


STEPS = 3


def numbers(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if not noise.numel():
        return noise
    flat = noise.reshape(shape[0] if shape else 1, -1)
    if kind == "rank 1":
        flat = torch.outer(flat[:, 0], flat[0])
    elif kind == "equal":
        flat = torch.eye(*flat.shape, dtype=torch.float64)
    elif kind == "one element":
        flat = torch.zeros_like(flat)
        flat.view(-1)[int(torch.randint(flat.numel(), (), generator=generator))] = 1.0
    elif kind in ("zero", "none"):
        flat = torch.zeros_like(flat)
    elif kind in ("1e-30", "1e30"):
        flat = flat * float(kind)
    elif kind == "spike":
        flat = flat * 1e4
    return flat.reshape(shape)


class Drawn:
    """A case's numbers: weights, and gradients of every step (None: no gradient), of whole
    parameters.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        self.start = [
            numbers(weight.start, weight.shape, generator).to(dtype) for weight in case.weights
        ]
        self.grads: list[list[Tensor | None]] = []
        for step in range(STEPS):
            grads: list[Tensor | None] = []
            for number, weight in enumerate(case.weights):
                kind = case.gradients[(step + number) % len(case.gradients)]
                if kind == "again" and step:
                    grads.append(self.grads[-1][number])
                elif kind == "none" and case.layout == "plain":
                    grads.append(None)
                else:
                    grads.append(numbers(kind, weight.shape, generator).to(dtype))
            self.grads.append(grads)
