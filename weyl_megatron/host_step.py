"""A step that the host steers: it looks at what the kernel found before it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import Tables
from .kernels import Kernel, Stepped
from .limits import Limits
from .projection import Projector
from .rule import SLOW_TAU, clipped_rates
from .spectral import PowerIteration
from .spectral.certificate import Certificate
from .spectral.collectives import Span, all_reduce_spans
from .spectral.iterations import Iterations
from .spectral.power import COLD_ITERS

#: The number of U among the operands of the products; W is operand 0.
_UPDATE = 1


class HostStep:
    """The middle of a step, on vectors of one number per matrix.

    Args:
        power: the blocks, and what iterates on them.
        kernel: the arithmetic on tiles.
        tables: the tiles.
        certificate: of the matrices.
        can_undo: matrices whose move can be taken back, bool.
        norm_spans: where the two numbers of each spread matrix lie in a vector of them.
        iters: block power iterations of a matrix that is measured.
        projector: of the matrices whose singular values are clipped.
    """

    def __init__(
        self,
        power: PowerIteration,
        kernel: Kernel,
        tables: Tables,
        certificate: Certificate,
        can_undo: Tensor,
        norm_spans: Mapping[int, Span],
        iters: int,
        projector: Projector | None = None,
    ) -> None:
        self._power, self._kernel, self._tables = power, kernel, tables
        self._certificate, self._can_undo, self._iters = certificate, can_undo, iters
        self._norm_spans, self._projector = norm_spans, projector
        matrices, batches = power.blocks.matrices, power.blocks.batches
        self._is_spread = [bool(batch and matrices[batch[0]].groups) for batch in batches]
        self._count = len(matrices)

    @property
    def arithmetic(self) -> str:
        """What differs where the kernel may round in other ways."""
        return str(getattr(self._kernel, "arithmetic", ""))

    def begin(
        self,
        weights: Sequence[Tensor],
        stepped: Sequence[Stepped | None],
        _: Sequence[Mapping[str, Any]],
        limits: Limits,
        *,
        cold: bool,
        has_fast: bool,
    ) -> None:
        """Take the tensors of a step, by buffer, and what holds in it; ``cold``: nothing is known
        of the vectors.
        """
        del has_fast  # what is measured is seen
        self._kernel.bind(weights, stepped)
        self._limits, self._cold = limits, cold
        device = self._can_undo.device
        self._sums = torch.zeros(self._count, 3, dtype=torch.float64, device=device)
        if self._projector is not None:
            self._projector.begin()

    def move_early(self) -> Tensor:
        """Step in one pass what is no matrix, and the matrices that are expected to be settled.

        Return the matrices that the certificate then settles; the others are put back.
        """
        limits, certificate, sums = self._limits, self._certificate, self._sums
        limit = limits.tau * torch.maximum(certificate.lower, limits.floor)
        decay = limits.lr * limits.weight_decay
        expected = certificate.forecast(limits.lr, limit, decay) & self._can_undo
        self._needs_moments = (~expected).byte()  # of those M and V are updated later
        if not expected.any():
            self._kernel.step(self._tables.rest, expected.byte(), sums)
            return expected
        self._kernel.step(self._tables.everything, expected.byte(), sums)
        settled = expected & self._proved(expected, limit)
        self._take_back(expected & ~settled)
        return settled

    def _proved(self, expected: Tensor, limit: Tensor) -> Tensor:
        """Return which of the matrices that were expected to be settled are. Collective."""
        lr, sums, certificate = self._limits.lr, self._sums, self._certificate
        # Of weights without a gradient no sums were made.
        is_changed = certificate.are_others(sums[:, 1]) & self._limits.is_present
        norms = torch.stack([sums[:, 0], is_changed], dim=1)
        # Not all spans: another rank of a group may have nothing else that is expected, and would
        # not be here.
        chosen = expected.tolist()
        all_reduce_spans(norms.view(-1), [s for k, s in self._norm_spans.items() if chosen[k]])
        sums[:, 0] = norms[:, 0]
        is_unchanged = norms[:, 1] == 0
        proof = certificate.settles(lr, limit, norms[:, 0].sqrt()) & is_unchanged
        return proof | self._limits.tau.isinf()

    def _take_back(self, failed: Tensor) -> None:
        """Take the move of matrices back that were not settled after all."""
        if failed.any():
            self._kernel.undo(self._tables.everything, failed.byte())
            self._sums[:, 2] = torch.where(failed, 0, self._sums[:, 2])

    def waiting(self, settled: Tensor) -> Iterator[int]:
        """Yield the number of each batch that has matrices which are not settled.

        Where the kernel can, it takes those that no other rank has pieces of through all lines by
        itself, before.
        """
        self._needs_move = (~settled).byte()
        self._iterations = self._iterations_of(self._needs_move)
        power, chosen = self._power, self._needs_move.tolist()
        batches = [
            number
            for number, batch in enumerate(power.blocks.batches)
            if any(chosen[k] for k in batch)
        ]
        if hasattr(self._kernel, "step_alone"):
            alone = [number for number in batches if not self._is_spread[number]]
            self._kernel.step_alone(
                alone,
                self._tables.of_batch,
                power.sigma,
                power.gain,
                self._iterations,
                self._needs_moments,
                self._needs_move,
                (self._limits.lr, self._limits.tau, self._limits.floor),
                self._sums,
                None if self._projector is None else self._projector.clipping,
            )
            batches = [number for number in batches if self._is_spread[number]]
        yield from batches

    def _iterations_of(self, chosen: Tensor) -> Iterations:
        """Return which of the chosen matrices make which iterations: a slow W half of U's.

        Stale vectors, from steps without any, need more, and new ones most.
        """
        most = max(COLD_ITERS, self._iters)
        if self._cold:
            of_both = torch.full((2, self._count), most, device=chosen.device)
            sure_of_both = of_both
        else:
            slow = self._limits.tau <= SLOW_TAU
            of_update = (self._iters + self._certificate.age).clamp(max=most)
            sure = of_update - self._iters // 2
            of_both = torch.stack([torch.where(slow, (of_update + 1) // 2, of_update), of_update])
            of_weight = torch.where(slow, (sure + 1) // 2, of_update)
            if self._projector is not None:
                # What σ₁ gains says nothing of the other singular values.
                sure = torch.where(self._projector.is_projected, of_update, sure)
            sure_of_both = torch.stack([of_weight, sure])
        return Iterations(of_both * chosen, sure_of_both, {_UPDATE: self._needs_moments})

    def sigmas(self, batch: int) -> tuple[Tensor, Tensor]:
        """Update M and V of a batch's matrices that waited; return σ₁(W) and σ₁(U) of all
        matrices.
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
        """Return α_W of every matrix.

        An iteration overflows where its operand grew 1e19-fold since the last one, and sees nothing
        of an update that is orthogonal to all vectors. Then bounds stand in its place: ‖U‖_F, and
        the floor under σ₁(W).
        """
        limits = self._limits
        sigma_update = torch.where(sigma_update > 0, sigma_update, self._sums[:, 0].sqrt())
        return clipped_rates(limits.lr, limits.tau, limits.floor, sigma_weight, sigma_update)

    def move(self, batch: int, rates: Tensor) -> None:
        """Move the weights of a batch that waited for their rates."""
        needs_move, limits = self._needs_move, self._limits
        if self._projector is not None and self._projector.has(batch):
            is_over = needs_move.bool() & (rates < limits.lr)
            bound = limits.tau * torch.fmax(self._power.sigma[0], limits.floor)
            projected = self._projector.move(batch, is_over, limits.lr, bound, self._sums)
            needs_move = needs_move & ~projected
        self._kernel.move(self._tables.of_batch[batch], needs_move, rates, self._sums)

    def end(self, settled: Tensor) -> None:
        """Let the certificate follow the step, and remember what it did."""
        limits, certificate = self._limits, self._certificate
        sigma_weight, sigma_update = self._power.sigma
        norm = self._sums[:, 0].sqrt()
        rates = torch.where(settled, limits.lr, self.rates(sigma_weight, sigma_update))
        lower = torch.where(settled, certificate.lower, sigma_weight)
        upper = torch.where(settled | ~(sigma_update > 0), norm, sigma_update)
        is_clipped, of_decay = rates < limits.lr, rates
        if self._projector is not None:
            rates, of_decay = self._projector.rates(rates, limits.lr)
        self._measured = lower, upper, rates, is_clipped, limits.tau, settled
        certificate.measured(~settled, sigma_weight)
        decay, squares = of_decay * limits.weight_decay, self._sums[:, 2].clone()
        certificate.moved(rates, decay, norm, squares, limits.is_present)
        self._kernel.release()

    def measured(self) -> tuple[Tensor, ...]:
        """Return the columns of ``MatrixStats`` after a step."""
        if self._projector is None:
            return self._measured
        clipping = self._projector.clipping
        return (*self._measured, clipping.clipped, clipping.share, clipping.unseen)

    def forget(self) -> None:
        """Nothing to forget: all that is kept is the certificate's."""
