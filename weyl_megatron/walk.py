"""Tensors that are stepped together, as the matrices that they hold pieces of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weyl_megatron.kernels import adamw_direction, adamw_update
from weyl_megatron.layouts.buffers import Buffer, Run, plan_of
from weyl_megatron.layouts.plain import storage_order
from weyl_megatron.rule import clipped_rates
from weyl_megatron.spectral import PowerIteration
from weyl_megatron.thresholds import Thresholds


class MatrixStats(NamedTuple):
    """What the last step did to one matrix; the same on every rank."""

    sigma_weight: float  #: σ₁(W) before the step
    sigma_update: float  #: σ₁(U) of the update U = M̂ / (√V̂ + ε)
    lr: float  #: the rate α_W that was used
    clipped: bool  #: whether α_W is below the scheduled rate
    tau: float  #: the threshold τ that held for this matrix


class Moments(NamedTuple):
    """M and V of one tensor at step t, flat as they lie in memory, with the hyperparameters of its group."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def direction(self) -> Tensor:
        """Return U, flat."""
        return adamw_direction(
            self.exp_avg, self.exp_avg_sq, step=self.step, beta1=self.beta1, beta2=self.beta2, eps=self.eps
        )

    def of_run(self, run: Run) -> Moments:
        """Return the same for one rectangle of the tensor."""
        return self._replace(exp_avg=_rectangle(self.exp_avg, run), exp_avg_sq=_rectangle(self.exp_avg_sq, run))

    def move(self, weight: Tensor, rate: float) -> None:
        """W ← W − α_W λ W − α_W U at the rate α_W, in place."""
        adamw_update(
            weight,
            self.exp_avg,
            self.exp_avg_sq,
            lr=rate,
            step=self.step,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


class Walk:
    """The matrices of tensors that are stepped together.

    Every rank of the tensors' process groups walks the same matrices in the same order, with or without a piece of
    them, so that collectives never diverge.
    """

    def __init__(self, buffers: Sequence[Buffer], thresholds: Thresholds, power_iters: int) -> None:
        self._tensors = [buffer.tensor for buffer in buffers]
        self._plan = plan_of(buffers, thresholds.grid)
        self._thresholds = thresholds
        self._measured: tuple[Tensor, ...] = ()  # the columns of MatrixStats
        self._power = PowerIteration(
            self._plan.matrices,
            self._plan.tiles,
            operands=2,
            iters=power_iters,
            device=self._tensors[0].device,
            dtype=torch.float64 if all(tensor.dtype == torch.float64 for tensor in self._tensors) else torch.float32,
        )

    def sigmas(self, stepped: Sequence[Moments | None]) -> tuple[Tensor, Tensor]:
        """Return σ₁(W) and σ₁(U) of every matrix (line 6), float64 on the CPU; U is 0 where there are no moments."""
        weights = [flat(tensor) for tensor in self._tensors]
        updates = [
            torch.zeros_like(weight) if moments is None else moments.direction()
            for weight, moments in zip(weights, stepped, strict=True)
        ]
        sigma_weight, sigma_update = self._power.sigmas([weights, updates]).double().cpu()
        return sigma_weight, sigma_update

    def rates(self, groups: Sequence[dict[str, Any]], sigma_weight: Tensor, sigma_update: Tensor) -> list[float]:
        """Return α_W of every matrix (lines 7 to 9); ``groups`` has the parameter group of every tensor."""
        of = [groups[number] for number in self._plan.buffer_of]
        limits = [
            self._thresholds.floor_and_tau(parameter, matrix.rows, matrix.cols, group["tau"])
            for parameter, matrix, group in zip(self._plan.parameters, self._plan.matrices, of, strict=True)
        ]
        lr = torch.tensor([float(group["lr"]) for group in of], dtype=torch.float64)
        floor, tau = torch.tensor(limits, dtype=torch.float64).view(-1, 2).unbind(1)
        rates = clipped_rates(lr, tau, floor, sigma_weight, sigma_update)
        self._measured = sigma_weight, sigma_update, rates, rates < lr, tau
        return [float(rate) for rate in rates.tolist()]

    def apply(self, number: int, moments: Moments, rates: Sequence[float]) -> None:
        """Move the weights of one tensor, every run of it at its rate (lines 10 to 14)."""
        weight, runs = flat(self._tensors[number]), self._plan.runs[number]
        of_run = [moments.lr if run.matrix is None else rates[run.matrix] for run in runs]
        if len(set(of_run)) == 1:
            moments.move(weight, of_run[0])
            return
        for run, rate in zip(runs, of_run, strict=True):
            moments.of_run(run).move(_rectangle(weight, run), rate)

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did, by the matrix's name."""
        columns = [column.tolist() for column in self._measured]
        return {matrix.name: MatrixStats(*row) for matrix, *row in zip(self._plan.matrices, *columns, strict=False)}

    def forget(self) -> None:
        """Take the power iteration's vectors for unknown at the next step (after a checkpoint was loaded)."""
        self._power.forget()


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory."""
    return tensor.detach().permute(storage_order(tensor)).view(-1)


def _rectangle(buffer: Tensor, run: Run) -> Tensor:
    """Return the view (rows, cols) of a flat buffer that a run is."""
    return buffer.as_strided((run.rows, run.cols), (run.stride, 1), buffer.storage_offset() + run.offset)
