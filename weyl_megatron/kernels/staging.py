"""What the host sends a GPU in every step: one copy, which the host does not wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .stepped import Hyper, Stepped
from .triton_step import numbers
from .triton_step.tables import HYPER

#: Steps that may be on their way to a device at once.
_STAGES = 4

#: Words of eight bytes that a buffer's pointers and hyperparameters take.
_WORDS = 4 + HYPER // 2


class _Stage:
    """Memory of the host out of which a step is sent to the device.

    Args:
        buffers, matrices: how many there are.
        is_cuda: whether a GPU reads it, at its leisure.
    """

    def __init__(self, buffers: int, matrices: int, is_cuda: bool) -> None:
        head = buffers * _WORDS
        size = head + numbers.SENT * matrices
        self.words = torch.zeros(size, dtype=torch.float64, pin_memory=is_cuda)
        self.pointers = self.words[: 4 * buffers].view(torch.int64)
        self.hypers = self.words[4 * buffers : head].view(torch.float32).view(-1, HYPER)
        self.rows = list(self.words[head:].view(numbers.SENT, matrices))
        self.is_read: Any = torch.Event("cuda") if is_cuda else None


class Staging:
    """Pointers and hyperparameters of every buffer, and the numbers of every matrix, on a device.

    ``pointers`` is ``(buffers · 4,)``, int64, ``hypers`` ``(buffers · HYPER,)``, float32 (see
    triton_step/tables.py), ``numbers`` ``(numbers.ROWS, matrices)``, float64, of which the host
    sends the first rows.

    Args:
        buffers, matrices: how many there are.
        device: where they are read.
    """

    def __init__(self, buffers: int, matrices: int, device: torch.device) -> None:
        head = buffers * _WORDS
        words = torch.zeros(head + numbers.ROWS * matrices, dtype=torch.float64, device=device)
        self._sent = words[: head + numbers.SENT * matrices]
        self.pointers = words[: 4 * buffers].view(torch.int64)
        self.hypers = words[4 * buffers : head].view(torch.float32)
        self.numbers = words[head:].view(numbers.ROWS, matrices)
        is_cuda = device.type == "cuda"
        self._stages = deque(_Stage(buffers, matrices, is_cuda) for _ in range(_STAGES))

    def send(
        self, weights: Sequence[Tensor], stepped: Sequence[Stepped | None], sent: Sequence[Tensor]
    ) -> None:
        """Send where a step's tensors are and what holds in it; see :meth:`.TritonKernel.bind`."""
        places: list[int] = []
        hypers: list[list[float]] = []
        row_of: dict[int, int] = {}
        rows = [0] * len(weights)
        for number, (weight, state) in enumerate(zip(weights, stepped, strict=True)):
            if state is None:
                places += weight.data_ptr(), 0, 0, 0
                continue
            places += (
                weight.data_ptr(),
                state.grad.data_ptr(),
                state.exp_avg.data_ptr(),
                state.exp_avg_sq.data_ptr(),
            )
            key = id(state.hyper)  # of a parameter group and a count, most share one
            if key not in row_of:
                row_of[key] = len(hypers)
                hypers.append(_hyper(state.hyper))
            rows[number] = row_of[key]
        self._stages.rotate()
        stage = self._stages[0]
        if stage.is_read is not None:
            stage.is_read.synchronize()  # it was sent some steps ago
        stage.pointers.copy_(torch.tensor(places))
        of_buffers = torch.tensor(rows)
        torch.index_select(torch.tensor(hypers or [[0.0] * HYPER]), 0, of_buffers, out=stage.hypers)
        torch._foreach_copy_(stage.rows, list(sent))
        self._sent.copy_(stage.words, non_blocking=True)
        if stage.is_read is not None:
            stage.is_read.record()


def _hyper(hyper: Hyper) -> list[float]:
    """Return a row of the hyperparameters, see triton_step/tables.py."""
    lr, beta1, beta2, eps, weight_decay, correction1, correction2 = hyper.numbers()
    root = correction2**0.5
    moments = [1 - beta1, beta2, 1 - beta2]
    direction = [correction1 / root, eps * correction1]
    move = [lr, weight_decay, correction1, root, eps]
    return [*moments, *direction, *move, 0.0, 0.0]


def count_as_changed(weights: Sequence[Tensor]) -> None:
    """Tell autograd of weights that are changed behind its back."""
    change: Any = torch.autograd.graph.increment_version
    try:
        change(list(weights))
    except TypeError:  # an older torch takes one
        for weight in weights:
            change(weight)
