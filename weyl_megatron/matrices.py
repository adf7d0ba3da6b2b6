"""Tensors that are stepped together, as the matrices that they hold pieces of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import Stepped, pick
from .kernels.choice import VARIABLE
from .layouts.buffers import Buffer, Plan, plan_of
from .rule import SLOW_TAU, clipped_rates
from .spectral import PowerIteration
from .spectral.blocks import COLUMNS, Operand, Table, table
from .spectral.certificate import Certificate
from .spectral.collectives import Span, all_reduce_spans
from .spectral.power import BLOCK, COLD_ITERS, rows_of
from .spectral.tiles import Tile
from .thresholds import Thresholds

#: Elements of the matrices that are measured together on a CPU: what a cache may still hold when it
#: is read again.
_CPU_BATCH = 5 << 18

#: On other devices so many batches at most: each is a few launches.
_DEVICE_BATCHES = 8

#: Iterations beyond the usual that a matrix may ask for after settled steps, where the host does
#: not see which do.
_STALE_ITERS = 2


class MatrixStats(NamedTuple):
    """What the last step did to one matrix; the same on every rank.

    Where ``certified``, no σ₁ was measured, because the bounds that stand in their places prove
    that the clip is
    inactive: ``sigma_weight`` is a lower bound, ``sigma_update`` an upper one, ‖U‖_F.
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


class MatrixGroup:
    """The matrices of tensors that are stepped together.

    Every rank of the tensors' process groups walks the same matrices in the same order, with or
    without a piece of them, so that collectives never diverge. Collective over these groups.

    Args:
        buffers: what lies in the tensors, which are on one device.
        thresholds: τ and the floor of every matrix.
        power_iters: block power iterations of a matrix that is measured.
        is_adamw: whether every τ is infinite.
        is_amsgrad: whether any of them divides by the largest V so far.
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
        batches = _batches(self._plan, self._on_host)
        self._power = PowerIteration(
            self._plan.matrices,
            self._plan.tiles,
            widths=(BLOCK, BLOCK),  # of W and of U
            batches=batches,
            piggybacks=True,
            device=self._device,
            dtype=torch.float64
            if all(tensor.dtype == torch.float64 for tensor in tensors)
            else torch.float32,
        )
        self._kernel = pick(self._power.blocks, tensors, plain=is_adamw or is_amsgrad)
        self._tables(batches)
        self._check_kernels()
        # A step that was made too early can be taken back where rounding it twice is still
        # rounding.
        exact = torch.float32, torch.float64
        self._can_undo = torch.tensor(
            [tensors[number].dtype in exact for number in self._plan.buffer_of],
            dtype=torch.bool,
            device=self._device,
        )
        eps = max((torch.finfo(tensor.dtype).eps for tensor in tensors), default=0.0)
        self.certificate = Certificate(self._plan.matrices, eps, self._device)
        self._cold = True
        self._limits: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._measured: tuple[Tensor, ...] = ()  # the columns of MatrixStats
        self._present: tuple[bool, ...] = ()  # of each matrix: whether it has a gradient here
        self._has_gradient = torch.empty(0, dtype=torch.bool, device=self._device)  # the same

    def _check_kernels(self) -> None:
        """Raise ValueError on a rank whose kernel is not that of the others. Collective.

        Two kernels round differently, and where a rounding decides whether one more iteration is
        made, ranks would wait for each other for ever.
        """
        number = float(zlib.crc32(self._kernel.name.encode()))
        told = torch.tensor([1.0, number], dtype=torch.float64, device=self._device).repeat(
            len(self.names), 1
        )
        all_reduce_spans(told.view(-1), [span for _, span in self._norm_spans])
        for name, (ranks, total) in zip(
            self.names, told.tolist(), strict=True
        ):  # of a matrix of its own: 1 rank
            if total != number * ranks:
                raise ValueError(
                    f"AdamW2: matrix '{name}' got a rank that steps in another kernel than "
                    f"'{self._kernel.name}', it takes one: `weyl-megatron doctor` tells why, "
                    f"{VARIABLE} sets it."
                )

    def _tables(self, batches: Sequence[Sequence[int]]) -> None:
        """Make the tables of everything and of every batch, of U's vectors, replicas included."""
        plan, operand = self._plan, self._power.blocks.operands[1]
        self._everything = _table(
            [*plan.tiles, *plan.replicas, *plan.rest], operand, len(plan.tiles), self._device
        )
        self._rest = _table(plan.rest, operand, 0, self._device)
        self._of_batch = []
        for batch in map(set, batches):
            mine = sorted(
                (tile for tile in plan.tiles if tile.matrix in batch), key=lambda tile: tile.matrix
            )
            theirs = [tile for tile in plan.replicas if tile.matrix in batch]
            self._of_batch.append(_table([*mine, *theirs], operand, len(mine), self._device))
        spread = [(k, matrix.groups) for k, matrix in enumerate(plan.matrices) if matrix.groups]
        self._norm_spans = [(k, Span(groups, 2 * k, 2 * k + 2)) for k, groups in spread]
        self._square_spans = [Span(groups, k, k + 1) for k, groups in spread]
        self._is_spread = [bool(batch and plan.matrices[batch[0]].groups) for batch in batches]

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
        self._lr, self._weight_decay, self._tau, self._floor = self._schedule(groups)
        present = tuple(stepped[number] is not None for number in self._plan.buffer_of)
        if present != self._present:
            self._present = present
            self._has_gradient = torch.tensor(present, dtype=torch.bool, device=self._device)
        self._sums = torch.zeros(len(self._lr), 3, dtype=torch.float64, device=self._device)

    def gradient_norms(self, stepped: Sequence[Stepped | None]) -> dict[str, float]:
        """Return ‖G‖_F of every matrix, by its name. Collective."""
        squares = torch.zeros(len(self._plan.matrices), dtype=torch.float64, device=self._device)
        for tile in self._plan.tiles:
            one = stepped[tile.buffer]
            if one is not None and tile.rows:
                rows = rows_of(one.grad, tile, 0, tile.rows)
                norm = torch.linalg.vector_norm(
                    rows, dtype=torch.promote_types(rows.dtype, torch.float32)
                )
                squares[tile.matrix] += norm.double().square()
        all_reduce_spans(squares, self._square_spans)
        return dict(zip(self.names, squares.sqrt().tolist(), strict=True))

    def move_early(self) -> Tensor:
        """Step in one pass what is no matrix, and the matrices that are expected to be settled
        (lines 3 to 14 at α).

        Return the matrices that the certificate then settles; the others are put back.
        """
        lr, sums, certificate = self._lr, self._sums, self.certificate
        limit = self._tau * torch.maximum(certificate.lower, self._floor)
        expected = certificate.forecast(lr, limit, lr * self._weight_decay) & self._can_undo
        self._waiting = (~expected).byte()
        if self._on_host and not expected.any():
            self._kernel.step(self._rest, expected.byte(), sums)
            return expected
        self._kernel.step(self._everything, expected.byte(), sums)
        are_others = (
            certificate.are_others(sums[:, 1]) & self._has_gradient
        )  # else they were not looked at
        norms = torch.stack([sums[:, 0], are_others], dim=1)
        # Not all spans: another rank of a group may have nothing else that is expected, and would
        # not be here.
        chosen = expected.tolist() if self._on_host else [True] * len(expected)
        all_reduce_spans(norms.view(-1), [span for k, span in self._norm_spans if chosen[k]])
        sums[:, 0] = norms[:, 0]
        is_inactive = certificate.settles(lr, limit, norms[:, 0].sqrt()) & (norms[:, 1] == 0)
        settled = expected & (is_inactive | self._tau.isinf())
        failed = expected & ~settled
        if not (self._on_host and not failed.any()):
            self._kernel.undo(self._everything, failed.byte())
            sums[:, 2] = torch.where(failed, 0, sums[:, 2])
        return settled

    def waiting(self, settled: Tensor) -> Iterator[int]:
        """Yield the number of each batch that has matrices which are not settled.

        Where the kernel can, it takes those that no other rank has pieces of through all lines by
        itself, before.
        """
        self._active = (~settled).byte()
        self._need, self._least = self._iterations()
        self._need *= self._active
        chosen = settled.tolist() if self._on_host else None
        batches = [
            number
            for number, batch in enumerate(self._power.blocks.batches)
            if chosen is None or not all(chosen[k] for k in batch)
        ]
        step_alone = getattr(self._kernel, "step_alone", None)
        if step_alone is not None:
            alone = [number for number in batches if not self._is_spread[number]]
            limits = self._lr, self._tau, self._floor
            power, state = self._power, (self._need, self._least, self._active, self._waiting)
            step_alone(alone, self._of_batch, power.sigma, power.gain, *state, limits, self._sums)
            batches = [number for number in batches if self._is_spread[number]]
        yield from batches

    def sigmas(self, batch: int) -> tuple[Tensor, Tensor]:
        """Update M and V of a batch's matrices that waited (lines 3 to 5); return their σ₁(W) and
        σ₁(U) (line 6).
        """
        power, blocks, sums = self._power, self._power.blocks, self._sums
        mine = blocks.piggyback_matrices[batch]
        blocks.load(batch)
        self._kernel.moments(self._of_batch[batch], self._waiting, sums)
        blocks.left[blocks.piggyback_at[batch]] = sums[mine, 0].to(blocks.left.dtype)
        masks, sure = self._masks()
        power.measure(self._kernel, batch, masks, begun=(None, self._waiting), sure=sure)
        if self._is_spread[batch]:
            sums[mine, 0] = torch.where(
                self._waiting[mine].bool(), power.piggybacked[mine], sums[mine, 0]
            )
        sigma_weight, sigma_update = power.sigma
        return sigma_weight, sigma_update

    def _iterations(self) -> tuple[Tensor, Tensor]:
        """Return the iterations that each matrix makes at most, and at least, ``(2, matrices)``: a
        slow W half of U's.

        Stale vectors, from steps without any, need more, and new ones most.
        """
        most = max(COLD_ITERS, self._iters)
        if self._cold:
            cold = torch.full((2, len(self._lr)), most, device=self._device)
            return cold, cold.clone()
        slow, of_update = (
            self._tau <= SLOW_TAU,
            (self._iters + self.certificate.age).clamp(max=most),
        )
        sure = of_update - self._iters // 2
        need = torch.stack([torch.where(slow, (of_update + 1) // 2, of_update), of_update])
        least = torch.stack([torch.where(slow, (sure + 1) // 2, of_update), sure])
        return need, least

    def _masks(
        self,
    ) -> tuple[list[tuple[Tensor | None, Tensor | None]], list[tuple[Tensor, Tensor]]]:
        """Return the matrices of each iteration, of W and of U (None: of none), and those that are
        sure to make it.
        """
        if self._on_host:
            of_weight, of_update = self._need.amax(1).tolist() if self._need.numel() else (0, 0)
        else:  # the host does not see which are stale
            most = max(COLD_ITERS, self._iters)
            of_update = most if self._cold else min(most, self._iters + _STALE_ITERS)
            of_weight = of_update if self._cold or self._has_fast else (of_update + 1) // 2
        numbers = torch.arange(of_update, device=self._device).view(-1, 1, 1)
        masks, sure = (self._need > numbers).byte(), (self._least > numbers).byte()
        of_both = [
            (mask[0] if number < of_weight else None, mask[1]) for number, mask in enumerate(masks)
        ]
        return of_both, [(mask[0], mask[1]) for mask in sure]

    def rates(self, sigma_weight: Tensor, sigma_update: Tensor) -> Tensor:
        """Return α_W of every matrix (lines 7 to 9).

        An iteration overflows where its operand grew 1e19-fold since the last one, and sees nothing
        of an update that is orthogonal to all vectors. Then bounds stand in its place: ‖U‖_F, and
        the floor under σ₁(W).
        """
        sigma_update = torch.where(sigma_update > 0, sigma_update, self._sums[:, 0].sqrt())
        return clipped_rates(self._lr, self._tau, self._floor, sigma_weight, sigma_update)

    def move(self, batch: int, rates: Tensor) -> None:
        """Move the weights of a batch that waited for their rates (lines 10 to 14)."""
        self._kernel.move(self._of_batch[batch], self._active, rates, self._sums)

    def end(self, settled: Tensor) -> None:
        """Carry the certificate on, and remember what the step did."""
        sigma_weight, sigma_update = self._power.sigma
        norm, certificate = self._sums[:, 0].sqrt(), self.certificate
        rates = torch.where(settled, self._lr, self.rates(sigma_weight, sigma_update))
        lower = torch.where(settled, certificate.lower, sigma_weight)
        upper = torch.where(settled | ~(sigma_update > 0), norm, sigma_update)
        self._measured = lower, upper, rates, rates < self._lr, self._tau, settled
        certificate.measured(~settled, sigma_weight)
        certificate.moved(
            rates, rates * self._weight_decay, norm, self._sums[:, 2].clone(), self._has_gradient
        )
        self._cold = False
        self._kernel.release()

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did, by the matrix's name."""
        columns = [column.tolist() for column in self._measured]
        return {
            matrix.name: MatrixStats(*row)
            for matrix, *row in zip(self._plan.matrices, *columns, strict=False)
        }

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

    def restore(self, carried: Mapping[str, SavedMatrix]) -> None:
        """Take back what walks carried of these matrices, by name; the walks may have been others,
        cut otherwise.
        """
        mine = [carried[name] for name in self.names if name in carried]
        kept = self._blocks()
        if [[block.shape for block in one.blocks] for one in mine] != [
            [block.shape for block in one] for one in kept
        ]:
            return
        for blocks, one in zip(kept, mine, strict=True):
            for block, saved in zip(blocks, one.blocks, strict=True):
                block.copy_(saved)
        self.certificate.restore(
            [torch.stack(column) for column in zip(*(one.bounds for one in mine), strict=True)]
        )
        self._cold = False

    def _blocks(self) -> list[list[Tensor]]:
        """Return the block that every matrix keeps of W and of U, as views."""
        found: list[list[Tensor]] = [[] for _ in self._plan.matrices]
        for operand in self._power.blocks.operands:
            for batch, kept in zip(self._power.blocks.batches, operand.kept, strict=True):
                sizes = [operand.widths[k] * self._plan.matrices[k].cols for k in batch]
                for k, block in zip(batch, torch.split(kept, sizes), strict=True):
                    found[k].append(block)
        return found

    def _schedule(self, groups: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the scheduled rate, weight decay, τ and the floor under σ₁(W) of every matrix."""
        of = [groups[number] for number in self._plan.buffer_of]
        taus = tuple(group["tau"] for group in groups)
        if taus not in self._limits:
            if any(tau == float("inf") for before in self._limits for tau in before):
                # where τ is infinite, nothing is checked of what the certificate says
                self.forget()
            limits = [
                self._thresholds.floor_and_tau(parameter, matrix.rows, matrix.cols, group["tau"])
                for parameter, matrix, group in zip(
                    self._plan.parameters, self._plan.matrices, of, strict=True
                )
            ]
            floor, tau = (
                torch.tensor(limits, dtype=torch.float64)
                .view(-1, 2)
                .T.contiguous()
                .to(self._device)
            )
            self._limits = {taus: (tau, floor)}
            # Where the host may not look, the size of collectives hangs on it: not on what this
            # rank has alone.
            self._has_fast = self._thresholds.has_fast or any(tau > SLOW_TAU for _, tau in limits)
        numbers = [
            [float(group["lr"]) for group in of],
            [float(group["weight_decay"]) for group in of],
        ]
        both = torch.tensor(numbers, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        lr, weight_decay = both.to(self._device, non_blocking=True)
        return lr, weight_decay, *self._limits[taus]


def _batches(plan: Plan, on_host: bool) -> list[list[int]]:
    """Return which matrices are measured together: spread ones all at once, others in turns."""
    spread = [k for k, matrix in enumerate(plan.matrices) if matrix.groups]
    alone = [k for k, matrix in enumerate(plan.matrices) if not matrix.groups]
    size = [matrix.rows * matrix.cols if on_host else matrix.cols for matrix in plan.matrices]
    most = _CPU_BATCH if on_host else -(-sum(size[k] for k in alone) // _DEVICE_BATCHES)
    batches = [spread] if spread else []
    room = 0
    for k in alone:
        if size[k] > room or batches[-1] is spread:
            batches.append([])
            room = most
        batches[-1].append(k)
        room -= size[k]
    return batches


def _table(tiles: Sequence[Tile], operand: Operand, measured: int, device: torch.device) -> Table:
    """Return a table of tiles, the first ``measured`` of which have vectors."""
    rows = [operand.row(tile) for tile in tiles[:measured]]
    padding = [0] * (len(COLUMNS) - 6)
    rows += [
        [t.buffer, t.offset, t.rows, t.cols, t.stride, t.matrix, *padding] for t in tiles[measured:]
    ]
    return table(rows, device, list(tiles))
