"""Tensors that are stepped together, as the matrices that they hold pieces of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import Tables, batches_of, spans_of
from .environment import DOCTOR, KERNEL
from .kernels import Stepped, pick
from .layouts.buffers import Buffer, plan_of
from .rule import SLOW_TAU, clipped_rates
from .spectral import PowerIteration
from .spectral.certificate import Certificate
from .spectral.collectives import all_reduce_spans
from .spectral.iterations import Iterations
from .spectral.power import BLOCK, COLD_ITERS, rows_of
from .thresholds import Thresholds

#: Iterations beyond the usual that a matrix may ask for after settled steps, where the host does
#: not see which do.
_STALE_ITERS = 2

#: The number of U among the operands of the products; W is operand 0.
_UPDATE = 1


class MatrixStats(NamedTuple):
    """What the last step did to one matrix; the same on every rank.

    Where ``certified``, no σ₁ was measured, because the bounds that stand in their places prove
    that the clip is inactive: ``sigma_weight`` is a lower bound, ``sigma_update`` an upper one,
    ‖U‖_F.
    """

    sigma_weight: float  #: σ₁(W) before the step
    sigma_update: float  #: σ₁(U) of the update U = M̂ / (√V̂ + ε)
    lr: float  #: the rate α_W that was used
    clipped: bool  #: whether α_W is below the scheduled rate
    tau: float  #: the threshold τ that held for this matrix
    certified: bool = False  #: whether the certificate settled the matrix, without an iteration


class SavedMatrix(NamedTuple):
    """What a checkpoint holds of one matrix."""

    step: float  #: how many had been made
    blocks: list[Tensor]  #: the vectors, of W and of U
    bounds: list[Tensor]  #: the certificate's numbers


class Limits(NamedTuple):
    """What holds for every matrix in a step: float64 vectors, ``(matrices,)``."""

    lr: Tensor  #: the scheduled rate α
    weight_decay: Tensor  #: λ
    tau: Tensor  #: τ
    floor: Tensor  #: what σ₁(W) is taken for at least


class MatrixGroup:
    """The matrices of tensors that are stepped together.

    Every rank of the tensors' process groups goes through the same matrices in the same order, with
    or without a piece of them, so that collectives never diverge. Collective over these groups.

    A step is ``begin``, ``move_early``, then ``sigmas``, ``rates`` and ``move`` for every batch
    that ``waiting`` yields, then ``end``.

    Args:
        buffers: what lies in the tensors, which are on one device.
        thresholds: τ and the floor of every matrix.
        power_iters: block power iterations of a matrix that is measured.
        is_adamw: whether every τ is infinite.
        is_amsgrad: whether any of them divides by the largest V so far.

    Raises:
        ValueError: ranks that share a matrix step it in different kernels.
    """

    def __init__(
        self,
        buffers: Sequence[Buffer],
        thresholds: Thresholds,
        power_iters: int,
        *,
        is_adamw: bool = False,
        is_amsgrad: bool = False,
    ) -> None:
        tensors = [buffer.tensor for buffer in buffers]
        self.tensors, self._thresholds, self._iters = tensors, thresholds, power_iters
        self.is_amsgrad, self.is_adamw = is_amsgrad, is_adamw
        self._plan = plan_of(buffers, thresholds.grid)
        self.names = [matrix.name for matrix in self._plan.matrices]
        self._device = tensors[0].device
        self._on_host = self._device.type == "cpu"
        is_double = all(tensor.dtype == torch.float64 for tensor in tensors)
        batches = batches_of(self._plan, self._on_host)
        self._power = PowerIteration(
            self._plan.matrices,
            self._plan.tiles,
            widths=(BLOCK, BLOCK),  # of W and of U
            batches=batches,
            piggybacks=True,
            device=self._device,
            dtype=torch.float64 if is_double else torch.float32,
        )
        blocks = self._power.blocks
        self._kernel = pick(blocks, tensors, plain=is_adamw or is_amsgrad)
        self._tables = Tables(self._plan, batches, blocks.operands[_UPDATE], self._device)
        self._is_spread = [bool(k and self._plan.matrices[k[0]].groups) for k in batches]
        self._norm_spans = spans_of(self._plan.matrices, 2)
        self._check_kernels()
        # A step that was made too early can be taken back where rounding it twice is still
        # rounding.
        exact = torch.float32, torch.float64
        is_exact = [tensors[number].dtype in exact for number in self._plan.buffer_of]
        self._can_undo = torch.tensor(is_exact, dtype=torch.bool, device=self._device)
        eps = max((torch.finfo(tensor.dtype).eps for tensor in tensors), default=0.0)
        self.certificate = Certificate(self._plan.matrices, eps, self._device)
        self._cold = True  # nothing is known of the vectors
        self._tau_and_floor: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # by the groups' τ
        self._measured: tuple[Tensor, ...] = ()  # the columns of MatrixStats
        self._present: tuple[bool, ...] = ()  # of each matrix: whether it has a gradient here
        self._has_gradient = torch.empty(0, dtype=torch.bool, device=self._device)  # the same

    def _check_kernels(self) -> None:
        """Raise ValueError on a rank whose kernel is not that of the others. Collective.

        Two kernels round differently, as does one that is compiled for two kinds of processors.
        Where a rounding decides whether one more iteration is made, ranks would wait for each other
        for ever.
        """
        identity = f"{self._kernel.name} {getattr(self._kernel, 'arithmetic', '')}"
        number = float(zlib.crc32(identity.encode()))
        pair = torch.tensor([1.0, number], dtype=torch.float64, device=self._device)
        sums = pair.repeat(len(self.names), 1)  # of a matrix that is not spread: 1 rank
        all_reduce_spans(sums.view(-1), list(self._norm_spans.values()))
        for name, (ranks, total) in zip(self.names, sums.tolist(), strict=True):
            if total != number * ranks:
                raise ValueError(
                    f"AdamW2: matrix '{name}' got a rank that steps in another kernel than "
                    f"'{self._kernel.name}', or in one for another processor, it takes one: "
                    f"`{DOCTOR}` tells why, {KERNEL} sets it."
                )

    def begin(
        self,
        weights: Sequence[Tensor],
        stepped: Sequence[Stepped | None],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        """Take the weights, gradients and moments of a step, and the parameter group, of every
        tensor.
        """
        self._kernel.bind(weights, stepped)
        self._limits = self._schedule(groups)
        present = tuple(stepped[number] is not None for number in self._plan.buffer_of)
        if present != self._present:
            self._present = present
            self._has_gradient = torch.tensor(present, dtype=torch.bool, device=self._device)
        self._sums = torch.zeros(len(self.names), 3, dtype=torch.float64, device=self._device)

    def gradient_norms(self, stepped: Sequence[Stepped | None]) -> dict[str, float]:
        """Return ‖G‖_F of every matrix, by its name. Collective."""
        squares = torch.zeros(len(self._plan.matrices), dtype=torch.float64, device=self._device)
        for tile in self._plan.tiles:
            state = stepped[tile.buffer]
            if state is not None and tile.rows:
                rows = rows_of(state.grad, tile, 0, tile.rows)
                dtype = torch.promote_types(rows.dtype, torch.float32)
                norm = torch.linalg.vector_norm(rows, dtype=dtype)
                squares[tile.matrix] += norm.double().square()
        all_reduce_spans(squares, list(spans_of(self._plan.matrices, 1).values()))
        return dict(zip(self.names, squares.sqrt().tolist(), strict=True))

    def move_early(self) -> Tensor:
        """Step in one pass what is no matrix, and the matrices that are expected to be settled
        (lines 3 to 14 at α).

        Return the matrices that the certificate then settles; the others are put back.
        """
        limits, certificate, sums = self._limits, self.certificate, self._sums
        limit = limits.tau * torch.maximum(certificate.lower, limits.floor)
        decay = limits.lr * limits.weight_decay
        expected = certificate.forecast(limits.lr, limit, decay) & self._can_undo
        self._needs_moments = (~expected).byte()  # of those M and V are updated later
        if self._on_host and not expected.any():
            self._kernel.step(self._tables.rest, expected.byte(), sums)
            return expected
        self._kernel.step(self._tables.everything, expected.byte(), sums)
        settled = expected & self._proved(expected, limit)
        self._take_back(expected & ~settled)
        return settled

    def _proved(self, expected: Tensor, limit: Tensor) -> Tensor:
        """Return which of the matrices that were expected to be settled are. Collective."""
        lr, sums, certificate = self._limits.lr, self._sums, self.certificate
        # Of weights without a gradient no sums were made.
        is_changed = certificate.are_others(sums[:, 1]) & self._has_gradient
        norms = torch.stack([sums[:, 0], is_changed], dim=1)
        # Not all spans: another rank of a group may have nothing else that is expected, and would
        # not be here.
        chosen = expected.tolist() if self._on_host else [True] * len(expected)
        all_reduce_spans(norms.view(-1), [s for k, s in self._norm_spans.items() if chosen[k]])
        sums[:, 0] = norms[:, 0]
        is_unchanged = norms[:, 1] == 0
        proof = certificate.settles(lr, limit, norms[:, 0].sqrt()) & is_unchanged
        return proof | self._limits.tau.isinf()

    def _take_back(self, failed: Tensor) -> None:
        """Take the move of matrices back that were not settled after all."""
        if not self._on_host or failed.any():
            self._kernel.undo(self._tables.everything, failed.byte())
            self._sums[:, 2] = torch.where(failed, 0, self._sums[:, 2])

    def waiting(self, settled: Tensor) -> Iterator[int]:
        """Yield the number of each batch that has matrices which are not settled.

        Where the kernel can, it takes those that no other rank has pieces of through all lines by
        itself, before.
        """
        self._needs_move = (~settled).byte()
        self._iterations = self._iterations_of(self._needs_move)
        power, batches = self._power, list(range(len(self._is_spread)))
        if self._on_host:
            chosen = self._needs_move.tolist()
            batches = [n for n in batches if any(chosen[k] for k in power.blocks.batches[n])]
        if hasattr(self._kernel, "step_alone"):
            self._kernel.step_alone(
                [number for number in batches if not self._is_spread[number]],
                self._tables.of_batch,
                power.sigma,
                power.gain,
                self._iterations,
                self._needs_moments,
                self._needs_move,
                (self._limits.lr, self._limits.tau, self._limits.floor),
                self._sums,
            )
            batches = [number for number in batches if self._is_spread[number]]
        yield from batches

    def _iterations_of(self, chosen: Tensor) -> Iterations:
        """Return which of the chosen matrices make which iterations: a slow W half of U's.

        Stale vectors, from steps without any, need more, and new ones most.
        """
        most = max(COLD_ITERS, self._iters)
        if self._cold:
            of_both = torch.full((2, len(self.names)), most, device=self._device)
            sure_of_both = of_both
        else:
            slow = self._limits.tau <= SLOW_TAU
            of_update = (self._iters + self.certificate.age).clamp(max=most)
            sure = of_update - self._iters // 2
            of_both = torch.stack([torch.where(slow, (of_update + 1) // 2, of_update), of_update])
            sure_of_both = torch.stack([torch.where(slow, (sure + 1) // 2, of_update), sure])
        rounds = None
        if not self._on_host:  # which does not see the vectors that are stale
            stale = most if self._cold else min(most, self._iters + _STALE_ITERS)
            rounds = (stale if self._cold or self._has_fast else (stale + 1) // 2), stale
        begun = {_UPDATE: self._needs_moments}
        return Iterations(of_both * chosen, sure_of_both, begun, rounds)

    def sigmas(self, batch: int) -> tuple[Tensor, Tensor]:
        """Update M and V of a batch's matrices that waited (lines 3 to 5); return σ₁(W) and σ₁(U)
        (line 6), of all matrices.
        """
        power, blocks, sums = self._power, self._power.blocks, self._sums
        members, places = blocks.piggyback_matrices[batch], blocks.piggyback_at[batch]
        blocks.load(batch)
        self._kernel.moments(self._tables.of_batch[batch], self._needs_moments, sums)
        blocks.left[places] = sums[members, 0].to(blocks.left.dtype)
        power.measure(self._kernel, batch, self._iterations)
        if self._is_spread[batch]:
            is_new = self._needs_moments[members].bool()
            sums[members, 0] = torch.where(is_new, power.piggybacked[members], sums[members, 0])
        sigma_weight, sigma_update = power.sigma
        return sigma_weight, sigma_update

    def rates(self, sigma_weight: Tensor, sigma_update: Tensor) -> Tensor:
        """Return α_W of every matrix (lines 7 to 9).

        An iteration overflows where its operand grew 1e19-fold since the last one, and sees nothing
        of an update that is orthogonal to all vectors. Then bounds stand in its place: ‖U‖_F, and
        the floor under σ₁(W).
        """
        limits = self._limits
        sigma_update = torch.where(sigma_update > 0, sigma_update, self._sums[:, 0].sqrt())
        return clipped_rates(limits.lr, limits.tau, limits.floor, sigma_weight, sigma_update)

    def move(self, batch: int, rates: Tensor) -> None:
        """Move the weights of a batch that waited for their rates (lines 10 to 14)."""
        self._kernel.move(self._tables.of_batch[batch], self._needs_move, rates, self._sums)

    def end(self, settled: Tensor) -> None:
        """Let the certificate follow the step, and remember what it did."""
        limits, certificate = self._limits, self.certificate
        sigma_weight, sigma_update = self._power.sigma
        norm = self._sums[:, 0].sqrt()
        rates = torch.where(settled, limits.lr, self.rates(sigma_weight, sigma_update))
        lower = torch.where(settled, certificate.lower, sigma_weight)
        upper = torch.where(settled | ~(sigma_update > 0), norm, sigma_update)
        self._measured = lower, upper, rates, rates < limits.lr, limits.tau, settled
        certificate.measured(~settled, sigma_weight)
        decay, squares = rates * limits.weight_decay, self._sums[:, 2].clone()
        certificate.moved(rates, decay, norm, squares, self._has_gradient)
        self._cold = False
        self._kernel.release()

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did, by the matrix's name."""
        columns = [column.tolist() for column in self._measured]
        return {name: MatrixStats(*row) for name, *row in zip(self.names, *columns, strict=False)}

    def forget(self) -> None:
        """Take vectors and bounds for unknown at the next step, as at the first."""
        self._cold = True
        self._power.blocks.restart()
        self.certificate.forget()

    def saved(self) -> dict[str, Any] | None:
        """Return what the next step takes from the last ones, as a checkpoint holds it; None:
        nothing.
        """
        if self._cold or self.is_adamw:
            return None
        return {
            "matrices": self.names,
            "blocks": self._blocks(),
            "bounds": self.certificate.saved(),
        }

    def restore(self, saved: Mapping[str, SavedMatrix]) -> None:
        """Take back what was saved of these matrices, by name; in groups that may have been others,
        cut otherwise.
        """
        records = [saved[name] for name in self.names if name in saved]
        kept = self._blocks()
        shapes = [[block.shape for block in record.blocks] for record in records]
        if shapes != [[block.shape for block in blocks] for blocks in kept]:
            return
        for blocks, record in zip(kept, records, strict=True):
            for block, saved_block in zip(blocks, record.blocks, strict=True):
                block.copy_(saved_block)
        bounds = zip(*(record.bounds for record in records), strict=True)
        self.certificate.restore([torch.stack(column) for column in bounds])
        self._cold = False

    def _blocks(self) -> list[list[Tensor]]:
        """Return the block that every matrix keeps of W and of U, as views."""
        blocks: list[list[Tensor]] = [[] for _ in self._plan.matrices]
        for operand in self._power.blocks.operands:
            for batch, kept in zip(self._power.blocks.batches, operand.kept, strict=True):
                sizes = [operand.widths[k] * self._plan.matrices[k].cols for k in batch]
                for k, block in zip(batch, torch.split(kept, sizes), strict=True):
                    blocks[k].append(block)
        return blocks

    def _schedule(self, groups: Sequence[dict[str, Any]]) -> Limits:
        """Return what a step's parameter groups, of every tensor, say of every matrix."""
        taus = tuple(group["tau"] for group in groups)
        if taus not in self._tau_and_floor:
            if any(tau == float("inf") for before in self._tau_and_floor for tau in before):
                # where τ is infinite, nothing is checked of what the certificate says
                self.forget()
            self._tau_and_floor = {taus: self._read_taus(groups)}
        of_matrices = [groups[number] for number in self._plan.buffer_of]
        numbers = [
            [float(group["lr"]) for group in of_matrices],
            [float(group["weight_decay"]) for group in of_matrices],
        ]
        both = torch.tensor(numbers, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        lr, weight_decay = both.to(self._device, non_blocking=True)
        return Limits(lr, weight_decay, *self._tau_and_floor[taus])

    def _read_taus(self, groups: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Return τ and the floor under σ₁(W) of every matrix."""
        plan = self._plan
        limits = [
            self._thresholds.floor_and_tau(parameter, matrix.rows, matrix.cols, groups[n]["tau"])
            for parameter, matrix, n in zip(
                plan.parameters, plan.matrices, plan.buffer_of, strict=True
            )
        ]
        # Where the host may not look, the size of collectives hangs on it: not on what this rank
        # has alone.
        self._has_fast = self._thresholds.has_fast or any(tau > SLOW_TAU for _, tau in limits)
        columns = torch.tensor(limits, dtype=torch.float64).view(-1, 2).T.contiguous()
        floor, tau = columns.to(self._device)
        return tau, floor
