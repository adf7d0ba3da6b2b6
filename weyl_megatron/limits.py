"""What a step's parameter groups say of every matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layouts.buffers import Plan
from .rule import SLOW_TAU
from .thresholds import Thresholds


class Limits(NamedTuple):
    """What holds for every matrix in a step: vectors, ``(matrices,)``, float64 but for the last."""

    lr: Tensor  #: the scheduled rate α
    weight_decay: Tensor  #: λ
    tau: Tensor  #: τ
    floor: Tensor  #: what σ₁(W) is taken for at least
    is_present: Tensor  #: whether there is a gradient here; bool


class Schedule:
    """Reads the limits of a step out of its parameter groups.

    Args:
        plan: what lies where.
        thresholds: τ and the floor of every matrix.
        device: of the limits.
    """

    def __init__(self, plan: Plan, thresholds: Thresholds, device: torch.device) -> None:
        self._plan, self._thresholds, self._device = plan, thresholds, device
        self._taus: tuple[Any, ...] | None = None  # of the tensors' groups, at the last step
        self._present: tuple[bool, ...] | None = None
        #: whether any τ, also of matrices elsewhere, is beyond SLOW_TAU
        self.has_fast = False
        #: whether some τ was infinite and is another now: what the certificate says was not checked
        self.was_infinite = False

    def read(self, groups: Sequence[Mapping[str, Any]], is_there: Sequence[bool]) -> Limits:
        """Return what holds in a step.

        Args:
            groups: the parameter group of every tensor.
            is_there: whether the tensor has a gradient.
        """
        taus = tuple(group["tau"] for group in groups)
        is_new = taus != self._taus
        self.was_infinite = is_new and self._taus is not None and float("inf") in self._taus
        if is_new:
            self._taus = taus
            self._read_taus(groups)
        buffer_of = self._plan.buffer_of
        present = tuple(is_there[number] for number in buffer_of)
        if present != self._present:
            self._present = present
            self._is_present = torch.tensor(present, dtype=torch.bool, device=self._device)
        row_of: dict[int, int] = {}
        rows: list[tuple[float, float]] = []
        for group in groups:
            if id(group) not in row_of:
                row_of[id(group)] = len(rows)
                rows.append((float(group["lr"]), float(group["weight_decay"])))
        of_matrices = [row_of[id(groups[number])] for number in buffer_of]
        both = torch.tensor(rows or [(0.0, 0.0)], dtype=torch.float64).T
        lr, weight_decay = both[:, of_matrices].to(self._device)
        return Limits(lr, weight_decay, self._tau, self._floor, self._is_present)

    def _read_taus(self, groups: Sequence[Mapping[str, Any]]) -> None:
        plan = self._plan
        limits = [
            self._thresholds.floor_and_tau(parameter, matrix.rows, matrix.cols, groups[n]["tau"])
            for parameter, matrix, n in zip(
                plan.parameters, plan.matrices, plan.buffer_of, strict=True
            )
        ]
        # Where the host may not look, the size of collectives hangs on it: not on what this rank
        # has alone.
        self.has_fast = self._thresholds.has_fast or any(tau > SLOW_TAU for _, tau in limits)
        columns = torch.tensor(limits, dtype=torch.float64).view(-1, 2).T.contiguous()
        self._floor, self._tau = columns.to(self._device)
