"""Rule 1 by clipping singular values, in a step that the host steers (``clip="project"``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import tables_of_seen
from .kernels import Clipping, Kernel
from .layouts.buffers import Plan
from .rule import decay_rates, project
from .spectral import PowerIteration, ritz
from .spectral.seen import Seen


class Projector:
    """What becomes of the updates that are too large, of the matrices that are projected.

    Args:
        power: the blocks, and what iterates on them; it keeps for this what they see of U.
        kernel: the arithmetic on tiles.
        plan: what lies where.
        operand: the number of U among the operands.
        numbers: the matrices that are projected.
        device: of the vectors.
    """

    def __init__(
        self,
        power: PowerIteration,
        kernel: Kernel,
        plan: Plan,
        operand: int,
        numbers: Sequence[int],
        device: torch.device,
    ) -> None:
        blocks, count = power.blocks, len(plan.matrices)
        self._seen = power.seen = Seen(blocks, operand, numbers)
        self._kernel, self._tables = (
            kernel,
            tables_of_seen(plan, blocks.batches, self._seen, device),
        )
        is_projected = torch.zeros(count, dtype=torch.bool)
        is_projected[list(numbers)] = True
        self.is_projected = is_projected.to(device)
        widths = blocks.operands[operand].widths
        is_whole = [w == min(m.rows, m.cols) for w, m in zip(widths, plan.matrices, strict=True)]
        self._stacks = [self._alike(batch) for batch in blocks.batches]
        rate, decay, unseen, share = torch.zeros(4, count, dtype=torch.float64, device=device)
        #: what becomes of each matrix in a step
        self.clipping = Clipping(
            self._seen,
            self._tables,
            self.is_projected,
            torch.tensor(is_whole, dtype=torch.bool, device=device),
            rate,
            decay,
            unseen,
            share,
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros_like(self.is_projected),
        )
        self.begin()

    def begin(self) -> None:
        """Forget what the last step did."""
        self.clipping.clear()

    def has(self, batch: int) -> bool:
        """Whether any matrix of a batch is projected."""
        return bool(self._stacks[batch])

    def move(
        self,
        batch: int,
        is_over: Tensor,
        lr: Tensor,
        bound: Tensor,
        sums: Tensor,
    ) -> Tensor:
        """Move the weights of a batch's projected matrices whose update breaks the rule; return
        which these are, bool ``(matrices,)``.

        Args:
            batch: its number.
            is_over: the matrices that wait for their move and whose update is too large, bool.
            lr, bound: α and the bound of σ₁(α U) of every matrix.
            sums: see :class:`.Kernel`.
        """
        clipping = self.clipping
        is_active = is_over & self.is_projected
        if hasattr(self._kernel, "clip"):
            self._kernel.clip(batch, is_active.byte(), lr, bound, sums, clipping)
        else:
            chosen = is_active.tolist()
            for alike in self._stacks[batch]:
                some = [[k for k in numbers if chosen[k]] for numbers in alike]
                if any(some):
                    given = [numbers for numbers in some if numbers]
                    self._form(given, lr, bound, sums[:, 0].sqrt())
        self._kernel.project(
            self._tables[batch],
            is_active.byte(),
            (clipping.rate, clipping.decay),
            sums,
            self._seen,
        )
        clipping.is_active.logical_or_(is_active)
        return is_active

    def _form(self, alike: list[list[int]], lr: Tensor, bound: Tensor, norm: Tensor) -> None:
        """Make C of matrices of the same ranks and width, listed by their number of columns."""
        images = [[self._seen.operand.image(k) for k in numbers] for numbers in alike]
        of_z = [torch.stack([z for z, _ in members]).double() for members in images]
        gram_y = torch.stack([gram for members in images for _, gram in members]).double()
        gram_z = torch.cat([ritz.gram(z) for z in of_z])
        at = torch.tensor([k for numbers in alike for k in numbers]).to(lr.device)
        eps = torch.finfo(self._seen.z.dtype).eps
        grams, to = (gram_y, gram_z), self.clipping
        clip = project(grams, lr[at], bound[at], norm[at], to.is_whole[at], eps)
        to.rate[at], to.decay[at] = clip.rate, decay_rates(lr[at], clip)
        to.unseen[at], to.share[at] = clip.rate / lr[at], clip.share
        to.clipped[at] = clip.clipped
        first = 0
        for members, z in zip(images, of_z, strict=True):
            factors = clip.factor[first : first + len(z)]
            first += len(z)
            changed = ritz.products(factors, z)
            torch._foreach_copy_([image for image, _ in members], list(changed.to(self._seen.z)))

    def rates(self, rates: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖update‖_F / ‖U‖_F of every matrix, and what multiplied λ W.

        Args:
            rates: α_W of those that were scaled.
            lr: α.
        """
        clipping = self.clipping
        of_update = torch.where(clipping.is_active, clipping.share * lr, rates)
        return of_update, torch.where(clipping.is_active, clipping.decay, rates)

    def _alike(self, batch: Sequence[int]) -> list[list[list[int]]]:
        """Return the projected matrices of a batch: those of the same ranks and width in one list,
        and in that by their number of columns; see ``spectral/power.py``.
        """
        operand = self._seen.operand
        numbers: dict[Any, dict[int, list[int]]] = {}
        for k in batch:
            if k in self._seen.matrices:
                matrix = operand.matrices[k]
                alike = numbers.setdefault((matrix.groups, operand.widths[k]), {})
                alike.setdefault(matrix.cols, []).append(k)
        return [list(alike.values()) for alike in numbers.values()]
