"""Counts what AdamW2's own step hands to all-reduce, for benchmarks/scale.py, whose docstring says
what stands in for what.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

from weyl_megatron import AdamW2, matrices, state
from weyl_megatron import tensors as stepped_tensors
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.layouts.buffers import Buffer, Layout
from weyl_megatron.matrices import MatrixGroup
from weyl_megatron.settings import PROJECT, SCALE
from weyl_megatron.spectral import blocks

OPTIONS: dict[str, Any] = {"tau": 0.01, "power_iters": 2, "floor_std": 1e-3, "clip_vectors": False}

#: What Rule 1 does to an update that is too large; the vectors are the default's.
CLIPS = SCALE, PROJECT


class NoArithmetic:
    """A kernel that computes nothing and says that each Σ u² is ``square`` and each iteration
    gains: the most.
    """

    name = "none"

    def __init__(self, square: float) -> None:
        self._square = square

    def _say(self, *arguments: Any) -> None:
        arguments[-1][:, 0] = self._square

    def orthonormalize(self, *arguments: Any) -> None:
        arguments[-1].fill_(float("inf"))

    def _nothing(self, *_: Any) -> None: ...

    step = moments = _say
    bind = release = undo = move = project = multiply = multiply_back = _nothing


class Counted(NamedTuple):
    collectives: int
    bytes: int
    vectors: int  # bytes


def vectors_of(group: MatrixGroup) -> int:
    """Return the bytes of the vectors, what is kept of them for projection included."""
    parts = group._power.blocks
    kept = [block for operand in parts.operands for block in operand.kept]  # none where resident
    vectors = [parts.x, parts.z, parts.left, *kept]
    if (seen := group._power.seen) is not None:
        vectors += [seen.x, seen.z, seen.left]
    if group._steers_itself:
        kernel = group._step._kernel  # on a GPU, which keeps no x: the weights move before it goes
        vectors += [kernel._kept_z, kernel._kept_left]
    return sum(each.nbytes for each in vectors)


def count_step(
    buffers: list[Buffer], cut: list[Tensor], square: float, clip: str, io: list[str]
) -> Counted:
    """Step twice; count what the second step hands to ``all_reduce``.

    Args:
        buffers: what a rank steps.
        cut: the rows of every matrix that no rank has whole.
        square: what the arithmetic says of each Σ u².
        clip: one of ``CLIPS``.
        io: the names of embeddings, positions and the head, which are not projected.
    """
    optimizer = AdamW2([buffer.tensor for buffer in buffers], clip=clip, io=io, **OPTIONS)
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    for buffer in buffers:
        tensor = buffer.tensor
        tensor.grad = tensor.detach()
        optimizer.state[tensor] = {
            "step": torch.tensor(0.0),
            "exp_avg": tensor,
            "exp_avg_sq": tensor,
        }
    sent: list[int] = []
    with (
        patch.object(dist, "all_reduce", lambda tensor, **_: sent.append(tensor.nbytes)),
        patch.object(blocks, "_cut_rows", lambda *_: cut),
        patch.object(blocks, "start_block", lambda _, cols, b: torch.zeros(cols, b)),
        patch.object(matrices.MatrixGroup, "_check_ranks", lambda *_: None),
        patch.object(matrices, "pick", lambda tensors, **_: KERNELS[tensors[0].device.type]),
        patch.object(matrices, "make", lambda *_: NoArithmetic(square)),
        patch.object(JITFunction, "run", lambda *_, **__: None),
        # The tensors have one element each in memory.
        patch.object(state, "check_form", lambda *_: None),
        patch.object(stepped_tensors, "check_memory", lambda *_: None),
    ):
        optimizer.step()
        sent.clear()
        optimizer.step()
    (group,) = optimizer._matrix_groups
    return Counted(len(sent), sum(sent), vectors_of(group))


def on_cpu(length: int) -> Tensor:
    return nn.Parameter(torch.empty(1).expand(length))  # of that length, without the memory


def on_device(length: int) -> Tensor:
    return nn.Parameter(torch.empty(length, device="meta"))


#: Who steps what: a GPU steers its own step, by kernels that are not launched here.
KERNELS = {"cpu": "torch", "meta": "triton"}

STATES = {"certified": (on_cpu, 0.0), "measured": (on_cpu, 1e30), "either (GPU)": (on_device, 1e30)}
